"""Which dtypes of a weight file a model's parameters may come from.

Rule: a floating parameter comes from floating numbers. Complex ones lose a part, and whole numbers
and truth values are codes of some library without what they stand for, so both are refused by name.
Rounding to the dtype that was asked for is what asking means, but a number that is finite in the
file and would be infinite in the model is refused; 64 bits, which no model has, are told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from graphopt.errors import UnsupportedError, WeightFormatError

_FLOATS = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    # Every value of 8 bits is one of each dtype that a model can have.
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}

_READABLE = {*_FLOATS, "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "C64"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a safetensors file. dtype: as safetensors names it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        bits = re.search(r"\d+", self.dtype)
        count = 1
        for size in self.shape:
            count *= size
        return count * (int(bits[0]) if bits else 8) // 8


def check_dtypes(
    entries: Mapping[str, Entry], places: Mapping[str, torch.dtype | None], dtype: torch.dtype
) -> tuple[str, ...]:
    """What a user should know of the rounding to `dtype`.

    places: for every tensor that is to be checked the dtype of the parameter or buffer it is for,
    None where that is not known. Raises UnsupportedError naming the tensor.
    """
    for name, entry in entries.items():
        if entry.dtype not in _READABLE:
            raise UnsupportedError(
                f"{entry.path} holds {name} as {entry.dtype}; {', '.join(_FLOATS)} are read"
            )
    for name, place in places.items():
        entry = entries[name]
        is_number = place is None or place.is_floating_point
        if is_number != (entry.dtype in _FLOATS):
            kind = "a floating parameter" if is_number else f"a buffer of {place}"
            raise UnsupportedError(
                f"{entry.path} holds {name} as {entry.dtype}, which cannot become {kind} without "
                f"another meaning; convert it to one of {', '.join(_FLOATS)}"
            )
    wide = sorted(name for name, entry in entries.items() if entry.dtype == "F64")
    if not wide:
        return ()
    return (
        f"{', '.join(wide[:3])}: float64 in the file ({len(wide)} tensors), rounded to {dtype}",
    )


def narrowed(value: Tensor, dtype: torch.dtype, name: str, path: Path) -> Tensor:
    """`value` in `dtype`. Raises WeightFormatError when a finite number would become infinite."""
    result = value.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(value.dtype).max:
        lost = value[result.isinf() & value.isfinite()]
        if lost.numel():
            raise WeightFormatError(
                f"tensor {name} of {path} holds {float(lost[0]):g}, which is infinite as {dtype}; "
                f"load the model with a dtype that reaches it, such as torch.bfloat16"
            )
    return result


def check_narrowing(
    entries: Mapping[str, Entry], loaded: Iterable[Tensor], dtype: torch.dtype
) -> None:
    """The same of parameters that are loaded already; reads the files where one is infinite."""
    if all(bool(value.isfinite().all()) for value in loaded):
        return
    for name, entry in entries.items():
        if (
            entry.dtype in _FLOATS
            and torch.finfo(_FLOATS[entry.dtype]).max > torch.finfo(dtype).max
        ):
            narrowed(read_tensor(entry, name), dtype, name, entry.path)


def read_tensor(entry: Entry, name: str) -> Tensor:
    """The tensor `name`, in memory of its own."""
    with safe_open(entry.path, framework="pt") as file:
        value: Tensor = file.get_tensor(name)
        return value
