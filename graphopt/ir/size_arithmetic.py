"""Arithmetic on sizes in a graph: a closed list of functions of numbers, whose results are 64-bit.

A text can name these functions, so a number without a bound would be memory and time without one.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

SIZE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name)
    for name in (
        "add", "sub", "mul", "floordiv", "mod", "neg", "truediv", "pow", "getitem",
        "eq", "ne", "lt", "le", "gt", "ge",
    )
}  # fmt: skip
SIZE_FUNCTIONS |= {
    name: getattr(torch, name) for name in ("sym_max", "sym_min", "sym_float", "sym_int", "sym_not")
}
SIZE_FUNCTIONS |= {name: getattr(math, name) for name in ("ceil", "floor", "trunc")}

LARGEST = 2**63 - 1
LARGEST_EXPONENT = 64
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def check_operands(name: str, values: Sequence[Any]) -> None:
    """Raise ValueError unless `values` are what the size function `name` may be given.

    values: with the fake value in place of a node. `getitem` takes a part of several results.
    """
    if name == "getitem":
        if len(values) != 2 or not isinstance(values[0], (tuple, list)):
            raise ValueError("getitem takes one of the results of a call, and its number")
        if not isinstance(values[1], int):
            raise ValueError("the number of a result is an integer")
        return
    for value in values:
        if not isinstance(value, _NUMBERS):
            raise ValueError(f"{name} computes with sizes, not with {_told(value)}")
        check_size(value)
    if name == "pow" and not all(abs(_hint(value)) <= LARGEST_EXPONENT for value in values[1:]):
        raise ValueError(f"an exponent is at most {LARGEST_EXPONENT}")


def check_size(value: Any) -> None:
    """Raise ValueError for an integer beyond 64 bits; a symbolic one is judged by its hint."""
    if isinstance(value, (int, torch.SymInt)) and abs(_hint(value)) > LARGEST:
        raise ValueError("a size is at most 2**63 - 1")


def number_of_results(target: torch._ops.OpOverload, args: Sequence[Any], named: Any) -> int:
    """How many tensors a call gives; 1 where an argument's length bounds it.

    args, named: with fake values in place of nodes.
    """
    given = dict(zip((spec.name for spec in target._schema.arguments), args, strict=False))
    given = {spec.name: spec.default_value for spec in target._schema.arguments} | given | named
    source = given.get("self")
    returns = [str(item.type) for item in target._schema.returns]
    if not isinstance(source, torch.Tensor) or returns != ["List[Tensor]"]:
        return 1
    for count in ("chunks", "sections"):
        if isinstance(given.get(count), int):
            return int(given[count])
    axis = given.get("dim", 0)
    is_axis = isinstance(axis, int) and -source.ndim <= axis < source.ndim
    size = int(_hint(source.shape[axis])) if is_axis else 0
    part = given.get("split_size", 1)
    return -(-size // max(1, int(_hint(part)))) if isinstance(part, (int, torch.SymInt)) else 1


def _hint(value: Any) -> int | float:
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint if value.node.has_hint() else 0
    return value if isinstance(value, (int, float)) else 0


def _told(value: Any) -> str:
    return repr(value) if isinstance(value, str) and len(value) < 40 else type(value).__name__
