"""What a plan is made of: buffers, and steps whose operands are views into them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graphopt.codegen.cpu.abi import Op
from graphopt.codegen.cpu.views import Extent, View


@dataclass(frozen=True, slots=True)
class Temporary:
    """A buffer that lives in the arena. bytes_per_token != 0: it grows with the token rows."""

    fixed_bytes: int
    bytes_per_token: int


@dataclass(frozen=True, slots=True)
class External:
    """Memory that somebody else owns: logits, step inputs, caches, weights.

    size: bytes; None for caches, what belongs to them, and weights in a kernel's layout, which are
    no arrays to a plan.
    """

    name: str
    size: Extent | None = None


@dataclass(frozen=True, slots=True, eq=False)
class NativeStep:
    """One kernel call, operands still as views. The first `writes` operands are written.

    value: of the graph, "%12", that it is a part of.
    """

    op: Op
    operands: tuple[View | None, ...]
    dims: tuple[Extent, ...]
    strides: tuple[tuple[int, ...], ...]
    attrs_i: tuple[int, ...] = ()
    attrs_f: tuple[float, ...] = ()
    writes: int = 1
    value: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class HostStep:
    """An op without a kernel: torch runs it between two native segments."""

    run: Callable[[Callable[[View | Extent], Any]], None]
    operands: tuple[View, ...]
    text: str
    op: str
    value: str
    writes: int = 1


Step = NativeStep | HostStep
