"""A GGUF file taken apart, so that any part can be changed, and put together again.

Written from the format's description, not from the reader under test: a part may hold what the
format forbids. Little endian, version 3.
"""

from __future__ import annotations

import copy
import struct
from dataclasses import dataclass, field
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {
    **{U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B"},
    **{U64: "Q", I64: "q", F64: "d"},
}
_ALIGNMENT = 32


@dataclass(slots=True)
class Value:
    """type: of the format's. data: a number, bytes for a string, a list of `Value`s of `item`, or
    the bytes of an array."""

    type: int
    data: Any
    item: int = U32
    count: int | None = None
    """Length that is written; the true one where it is None."""

    def write(self) -> bytes:
        """Without the type before it."""
        if self.type == STRING:
            return string(self.data, self.count)
        if self.type != ARRAY:
            return struct.pack("<" + FORMATS[self.type], self.data)
        if isinstance(self.data, bytes):
            return self.data
        count = len(self.data) if self.count is None else self.count
        return struct.pack("<IQ", self.item, count) + b"".join(one.write() for one in self.data)


@dataclass(slots=True)
class Tensor:
    """dims: in the file's order, columns first. data: its bytes; written where `offset` is None."""

    name: bytes
    dims: list[int]
    type: int
    data: bytes
    offset: int | None = None
    rank: int | None = None


@dataclass(slots=True)
class Parts:
    """version, magic: of the header. counts: what it says instead of (tensors, fields)."""

    fields: list[tuple[bytes, Value]]
    tensors: list[Tensor]
    magic: bytes = b"GGUF"
    version: int = 3
    counts: tuple[int | None, int | None] = (None, None)
    alignment: int = _ALIGNMENT
    gap: int = 0
    """Between tensors, beside what the alignment needs: so many times the alignment."""
    tail: bytes = field(default=b"")

    def copy(self) -> Parts:
        """One that shares nothing that changes."""
        return copy.deepcopy(self)

    def write(self) -> bytes:
        """The whole file."""
        tensors, fields = self.counts
        head = self.magic + struct.pack(
            "<IQQ",
            self.version,
            len(self.tensors) if tensors is None else tensors,
            len(self.fields) if fields is None else fields,
        )
        for key, value in self.fields:
            head += string(key) + struct.pack("<I", value.type) + value.write()
        data = b""
        for tensor in self.tensors:
            offset = len(data) if tensor.offset is None else tensor.offset
            rank = len(tensor.dims) if tensor.rank is None else tensor.rank
            head += string(tensor.name) + struct.pack("<I", rank)
            head += struct.pack(f"<{len(tensor.dims)}Q", *tensor.dims)
            head += struct.pack("<IQ", tensor.type, offset)
            if tensor.offset is None:
                data += padded(tensor.data, self.alignment) + bytes(self.gap * self.alignment)
        return padded(head, self.alignment) + data + self.tail


def string(text: bytes, count: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if count is None else count) + text


def padded(data: bytes, alignment: int) -> bytes:
    return data + bytes(-len(data) % alignment)


def read(data: bytes) -> Parts:
    """The parts of an intact file."""
    reader = _Reader(data)
    _, _, tensors, fields = reader.take("4sIQQ")
    parts = Parts([(reader.string(), reader.value(*reader.take("I"))) for _ in range(fields)], [])
    entries = []
    for _ in range(tensors):
        name, (rank,) = reader.string(), reader.take("I")
        entries.append((name, list(reader.take(f"{rank}Q")), *reader.take("IQ")))
    base = reader.position + -reader.position % _ALIGNMENT
    ends = sorted([offset for *_, offset in entries] + [len(data) - base])
    for name, dims, type_, offset in entries:
        end = next(place for place in ends if place > offset)
        parts.tensors.append(Tensor(name, dims, type_, data[base + offset : base + end]))
    return parts


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + form, self._data, self.position)
        self.position += struct.calcsize("<" + form)
        return values

    def string(self) -> bytes:
        (length,) = self.take("Q")
        (text,) = self.take(f"{length}s")
        return bytes(text)

    def value(self, type_: int) -> Value:
        if type_ == STRING:
            return Value(type_, self.string())
        if type_ != ARRAY:
            return Value(type_, self.take(FORMATS[type_])[0])
        item, count = self.take("IQ")
        return Value(type_, [self.value(item) for _ in range(count)], item)
