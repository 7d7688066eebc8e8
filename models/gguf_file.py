"""Reading a GGUF file: its metadata, its tensor table, and one tensor's bytes at a time.

Contract: `open_gguf(path)` reads only the header; `GgufFile.read(tensor)` reads one tensor into
memory of its own, so the peak is what the caller keeps plus one tensor. The file is checked as it
is read: bad magic, an unknown version or type, and truncation raise WeightFormatError.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md, little endian, versions 2 and 3.
The `gguf` package names the value and block types and knows the blocks' sizes. Its own reader makes
a numpy view for every string of the vocabulary (3 s for 49 152 tokens; this one takes 0.1 s).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from graphopt.errors import WeightFormatError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_SCALAR_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
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
    with path.open("rb") as file:
        header = _Header(file, path)
        metadata = header.metadata()
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        tensors = header.tensors(alignment)
        header_bytes = file.tell()
        file.seek(0)
        digest = hashlib.sha256(file.read(header_bytes)).hexdigest()
    end = max((tensor.offset + tensor.nbytes for tensor in tensors), default=0)
    size = path.stat().st_size
    if size < end:
        raise WeightFormatError(
            f"{path} is truncated: its tensors end at byte {end} but it has {size}; fetch it again"
        )
    return GgufFile(path, metadata, {tensor.name: tensor for tensor in tensors}, digest)


class _Header:
    """Sequential reader of the header; each method consumes what it returns."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._size = path.stat().st_size
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
        fields = {}
        for _ in range(self._field_count):
            key = self._string()
            fields[key] = self._value(self._value_type())
        return fields

    def tensors(self, alignment: int) -> list[GgufTensor]:
        table = []
        for _ in range(self._tensor_count):
            name = self._string()
            shape = tuple(reversed([self._scalar("Q") for _ in range(self._scalar("I"))]))
            table.append((name, shape, self._block_type(name), self._scalar("Q")))
        base = -(-self._file.tell() // alignment) * alignment
        return [
            GgufTensor(name, shape, type_, self._path, base + offset)
            for name, shape, type_, offset in table
        ]

    def _value(self, type_: GGUFValueType) -> Any:
        if type_ == GGUFValueType.STRING:
            return self._string()
        if type_ != GGUFValueType.ARRAY:
            return self._scalar(_SCALAR_FORMATS[type_])
        item_type, count = self._value_type(), self._scalar("Q")
        if item_type in _SCALAR_FORMATS:
            code = _SCALAR_FORMATS[item_type]
            data = self._bytes(count * struct.calcsize(f"<{code}"))
            return list(struct.unpack(f"<{count}{code}", data))
        return [self._value(item_type) for _ in range(count)]

    def _value_type(self) -> GGUFValueType:
        number = self._scalar("I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise WeightFormatError(f"{self._path} has a value of unknown type {number}") from None

    def _block_type(self, name: str) -> GGMLQuantizationType:
        number = self._scalar("I")
        try:
            return GGMLQuantizationType(number)
        except ValueError:
            raise WeightFormatError(
                f"tensor {name} of {self._path} has block type {number}, which the installed gguf "
                "package does not know; a newer one may"
            ) from None

    def _string(self) -> str:
        return self._bytes(self._scalar("Q")).decode("utf-8", errors="replace")

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))[0]

    def _bytes(self, count: int) -> bytes:
        # A damaged length must not become a giant allocation.
        data = self._file.read(count) if count <= self._size else b""
        if len(data) != count:
            raise WeightFormatError(f"{self._path} is truncated or damaged in its header")
        return data
