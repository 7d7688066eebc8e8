"""Reading a GGUF file: its metadata, its tensor table, and one tensor's bytes at a time.

Contract: `open_gguf(path)` reads only the header; `GgufFile.read(tensor)` reads one tensor into
memory of its own, so the peak is what the caller keeps plus one tensor. The header is checked as it
is read, and whatever the format does not allow raises WeightFormatError: another kind of file, bad
magic, an unknown version or type, truncation, a name that is there twice, an array of arrays, a
dimension of zero, rows of a part of a block, tensors that lie elsewhere than on the alignment or
over one another. What the metadata mean is for `gguf_schema` to check.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md, little endian, versions 2 and 3.
The `gguf` package names the value and block types and knows the blocks' sizes. Its own reader makes
a numpy view for every string of the vocabulary (3 s for 49 152 tokens; this one takes 0.1 s).
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from graphopt.errors import WeightFormatError
from graphopt.files.regular_file import check_regular
from graphopt.models.schema import SIZE, check

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
# Ten vocabularies of a million tokens.
_MOST_ITEMS = 30_000_000
_SCALAR_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "B",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One entry of the tensor table.

    shape: in PyTorch's order (rows first), the reverse of the file's.
    path: the file that holds it. offset: bytes from that file's start.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    path: Path
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, that is of the last axis."""
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return int(self.shape[-1] // block * block_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor in the file."""
        return prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of a GGUF file.

    metadata: key -> int, float, bool, str or list of them.
    tensors: name -> table entry.
    header_sha256: digest of everything before the tensors' data.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    header_sha256: str

    def read(self, tensor: GgufTensor) -> NDArray[np.uint8]:
        """The tensor's raw bytes, uint8 `[*shape[:-1], row_bytes]`, owned by the caller."""
        raw = np.fromfile(tensor.path, dtype=np.uint8, count=tensor.nbytes, offset=tensor.offset)
        if raw.size != tensor.nbytes:
            raise WeightFormatError(f"{tensor.path} is truncated inside tensor {tensor.name}")
        return raw.reshape(*tensor.shape[:-1], tensor.row_bytes)


def open_gguf(path: Path) -> GgufFile:
    """Read the header of `path`. Raises WeightFormatError when it is not an intact GGUF file."""
    size = check_regular(path, WeightFormatError)
    try:
        with path.open("rb") as file:
            header = _Header(file, path, size)
            metadata = header.metadata()
            alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
            check(path, "general.alignment", alignment, SIZE)
            if alignment.bit_count() != 1:
                raise WeightFormatError(
                    f"{path} has general.alignment={alignment}; it must be a power of two"
                )
            tensors = header.tensors(alignment)
            header_bytes = file.tell()
            file.seek(0)
            digest = hashlib.sha256(file.read(header_bytes)).hexdigest()
    except OSError as error:
        raise WeightFormatError(f"{path} cannot be read: {error}") from error
    _check_places(path, size, tensors.values())
    return GgufFile(path, metadata, tensors, digest)


def _check_places(path: Path, size: int, tensors: Iterable[GgufTensor]) -> None:
    """Every tensor lies in the file, and no two over one another."""
    ordered = sorted(tensors, key=lambda tensor: tensor.offset)
    for tensor, following in itertools.pairwise(ordered):
        if tensor.offset + tensor.nbytes > following.offset:
            raise WeightFormatError(
                f"{path} is damaged: the tensors {tensor.name} and {following.name} overlap"
            )
    end = max((tensor.offset + tensor.nbytes for tensor in ordered), default=0)
    if size < end:
        raise WeightFormatError(
            f"{path} is truncated: its tensors end at byte {end} but it has {size}; fetch it again"
        )


class _Header:
    """Sequential reader of the header; each method consumes what it returns."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self._file = file
        self._path = path
        self._size = size
        self._items = 0
        if self._bytes(4) != _MAGIC:
            raise WeightFormatError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise WeightFormatError(
                f"{path} has GGUF version {version} (big-endian files look like this too); "
                f"little-endian versions {_VERSIONS} can be read"
            )
        self._tensor_count = self._scalar("Q")
        self._field_count = self._scalar("Q")

    def metadata(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for _ in range(self._field_count):
            key = self._name()
            if key in fields:
                raise WeightFormatError(f"{self._path} is damaged: it has the key {key!r} twice")
            fields[key] = self._value(self._value_type(), key)
        return fields

    def tensors(self, alignment: int) -> dict[str, GgufTensor]:
        table: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
        for _ in range(self._tensor_count):
            name = self._name()
            if name in table:
                raise WeightFormatError(f"{self._path} is damaged: it has two tensors {name!r}")
            shape = self._shape(name)
            table[name] = (shape, self._block_type(name, shape[-1]), self._scalar("Q"))
            if table[name][2] % alignment:
                raise WeightFormatError(
                    f"{self._path} is damaged: tensor {name} lies at {table[name][2]}, which is no "
                    f"multiple of the alignment {alignment}"
                )
        base = -(-self._file.tell() // alignment) * alignment
        return {
            name: GgufTensor(name, shape, type_, self._path, base + offset)
            for name, (shape, type_, offset) in table.items()
        }

    def _shape(self, name: str) -> tuple[int, ...]:
        count = self._scalar("I")
        if not 1 <= count <= _MOST_DIMENSIONS:
            raise WeightFormatError(
                f"{self._path} is damaged: tensor {name} has {count} dimensions; 1 to "
                f"{_MOST_DIMENSIONS} are legal"
            )
        shape = tuple(reversed([self._scalar("Q") for _ in range(count)]))
        if 0 in shape:
            raise WeightFormatError(f"{self._path} is damaged: tensor {name} has shape {shape}")
        return shape

    def _value(self, type_: GGUFValueType, key: str) -> Any:
        if type_ == GGUFValueType.STRING:
            return self._string()
        if type_ != GGUFValueType.ARRAY:
            return self._numbers(type_, 1, key)[0]
        item_type, count = self._value_type(), self._scalar("Q")
        self._items += count
        if self._items > _MOST_ITEMS:
            raise WeightFormatError(
                f"{self._path} is damaged: its arrays have more than {_MOST_ITEMS} values with "
                f"{key!r}"
            )
        if item_type == GGUFValueType.ARRAY:
            raise WeightFormatError(
                f"{self._path} has an array of arrays for {key!r}, which no GGUF file needs"
            )
        if item_type in _SCALAR_FORMATS:
            return self._numbers(item_type, count, key)
        return [self._string() for _ in range(count)]

    def _numbers(self, type_: GGUFValueType, count: int, key: str) -> list[Any]:
        code = _SCALAR_FORMATS[type_]
        data = self._bytes(count * struct.calcsize(f"<{code}"))
        numbers = list(struct.unpack(f"<{count}{code}", data))
        if type_ != GGUFValueType.BOOL:
            return numbers
        if any(number > 1 for number in numbers):
            raise WeightFormatError(f"{self._path} is damaged: {key!r} is neither true nor false")
        return list(map(bool, numbers))

    def _value_type(self) -> GGUFValueType:
        number = self._scalar("I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise WeightFormatError(f"{self._path} has a value of unknown type {number}") from None

    def _block_type(self, name: str, columns: int) -> GGMLQuantizationType:
        number = self._scalar("I")
        try:
            type_ = GGMLQuantizationType(number)
        except ValueError:
            raise WeightFormatError(
                f"tensor {name} of {self._path} has block type {number}, which the installed gguf "
                "package does not know; a newer one may"
            ) from None
        if columns % GGML_QUANT_SIZES[type_][0]:
            raise WeightFormatError(
                f"{self._path} is damaged: tensor {name} has rows of {columns}, which is no number "
                f"of {type_.name} blocks ({GGML_QUANT_SIZES[type_][0]} each)"
            )
        return type_

    def _name(self) -> str:
        data = self._bytes(self._scalar("Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise WeightFormatError(
                f"{self._path} is damaged: a key or a tensor is called {data[:60]!r}"
            ) from None

    def _string(self) -> str:
        # Tokens may be any bytes.
        return self._bytes(self._scalar("Q")).decode("utf-8", errors="replace")

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))[0]

    def _bytes(self, count: int) -> bytes:
        # A damaged length must not become a giant allocation.
        data = self._file.read(count) if count <= self._size else b""
        if len(data) != count:
            raise WeightFormatError(f"{self._path} is truncated or damaged in its header")
        return data
