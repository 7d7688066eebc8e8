"""What the fakes of ops ask of their operands, so that a call that cannot be computed is refused
where it is written, read or verified, and never reaches a kernel.

Sizes that are symbols are not compared: torch compares them when the op runs, and the lowering of a
native kernel compares them by name.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Size = int | torch.SymInt


def require(condition: bool, text: str) -> None:
    """Raise ValueError saying what the op wants."""
    if not condition:
        raise ValueError(text)


def rank(name: str, tensor: Tensor, axes: int) -> None:
    """As many axes as its name has letters."""
    require(tensor.ndim == axes, f"{name} has {axes} axes, not {tensor.ndim}")


def size(name: str, found: Size, wanted: Size) -> None:
    """One size, where both are numbers."""
    if isinstance(found, int) and isinstance(wanted, int):
        require(found == wanted, f"{name} is {found}, and must be {wanted}")


def sizes(name: str, tensor: Tensor, *wanted: Size | None) -> None:
    """The shape of an operand; None for any size."""
    rank(name, tensor, len(wanted))
    for axis, (found, expected) in enumerate(zip(tensor.shape, wanted, strict=True)):
        if expected is not None:
            size(f"axis {axis} of {name}", found, expected)


def broadcast(name: str, vector: Tensor, width: Size) -> None:
    """A vector of `width`, or one number for all."""
    require(vector.ndim <= 1, f"{name} has 1 axis, not {vector.ndim}")
    if vector.ndim and not (isinstance(vector.shape[0], int) and vector.shape[0] == 1):
        size(f"axis 0 of {name}", vector.shape[0], width)


def floats(**tensors: Tensor | None) -> None:
    """Floating-point operands, or none."""
    for name, tensor in tensors.items():
        is_fine = tensor is None or tensor.is_floating_point()
        require(is_fine, f"{name} is {tensor.dtype if tensor is not None else None}, not a float")


def integers(**tensors: Tensor) -> None:
    """int64 operands: kernels read them as such."""
    for name, tensor in tensors.items():
        require(tensor.dtype == torch.int64, f"{name} is {tensor.dtype}, not torch.int64")


def finite(**numbers: float) -> None:
    """Attributes that are numbers."""
    for name, number in numbers.items():
        require(math.isfinite(number), f"{name}={number} is no number to compute with")


def least(low: float, **numbers: float) -> None:
    """Attributes of at least `low`."""
    for name, number in numbers.items():
        require(number >= low, f"{name}={number} must be {low} or more")
