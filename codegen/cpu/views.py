"""Strided views with symbolic extents: how the CPU plan sees tensors.

A view is a place (base, offset) and, per axis, an extent `mult * symbol` and a stride in elements.
Token rows are always the slowest axis in memory, so no stride depends on how many there are; axes
of extent 1 have stride 0. That makes the transposes around attention free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from graphopt.codegen.cpu.abi import Sym


@dataclass(frozen=True, slots=True)
class Extent:
    """`mult * symbol`; `Sym.SYM_ONE` for a plain number."""

    mult: int
    sym: Sym = Sym.SYM_ONE

    @property
    def is_one(self) -> bool:
        """True for the plain number 1."""
        return self.mult == 1 and self.sym is Sym.SYM_ONE

    def stand_in(self) -> int:
        """A number that divides like the extent does: a large prime for each symbol."""
        return self.mult * _PRIMES[self.sym]


_PRIMES = {
    Sym.SYM_ONE: 1,
    Sym.SYM_TOKENS: 1_000_003,
    Sym.SYM_REQUESTS: 1_000_033,
    Sym.SYM_LOGIT_ROWS: 1_000_037,
    Sym.SYM_BLOCK_COLUMNS: 1_000_039,
}


@dataclass(frozen=True, slots=True)
class View:
    """buffer: number of the storage it lies in; offset: bytes from its start."""

    buffer: int
    dtype: torch.dtype
    extents: tuple[Extent, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def shape_key(self) -> tuple[Extent, ...]:
        """Extents without axes of 1."""
        return tuple(e for e in self.extents if not e.is_one)

    def axes(self) -> list[tuple[Extent, int]]:
        """(extent, stride) of every axis that is not 1, outermost first."""
        return [(e, s) for e, s in zip(self.extents, self.strides, strict=True) if not e.is_one]

    def permuted(self, order: Sequence[int]) -> View:
        """Axes in another order."""
        return replace(
            self,
            extents=tuple(self.extents[i] for i in order),
            strides=tuple(self.strides[i] for i in order),
        )

    def narrowed(self, axis: int, start: int, extent: Extent, step: int = 1) -> View:
        """A range of one axis."""
        moved = self.offset + start * self.strides[axis] * self.dtype.itemsize
        extents, strides = list(self.extents), list(self.strides)
        extents[axis] = extent
        strides[axis] = 0 if extent.is_one else strides[axis] * step
        return replace(self, offset=moved, extents=tuple(extents), strides=tuple(strides))

    def expanded(self, extents: Sequence[Extent]) -> View:
        """Broadcast to `extents` (aligned at the last axis)."""
        missing = len(extents) - len(self.extents)
        own = (*(Extent(1),) * missing, *self.extents)
        strides = (*(0,) * missing, *self.strides)
        kept = [0 if mine.is_one else stride for mine, stride in zip(own, strides, strict=True)]
        return replace(self, extents=tuple(extents), strides=tuple(kept))

    def reshaped(self, extents: Sequence[Extent]) -> View | None:
        """Another shape over the same elements, or None when that needs a copy."""
        source = [(e.stand_in(), s) for e, s in self.axes()]
        strides: list[int] = []
        position, left, stride_end = 0, 1, 0
        # Walk both shapes from the outermost axis; a new axis takes a divisor of an old one, or a
        # run of old axes that lie contiguously.
        for extent in extents:
            if extent.is_one:
                strides.append(0)
                continue
            wanted = extent.stand_in()
            if left == 1:
                if position == len(source):
                    return None
                left, stride_end = source[position]
                position += 1
            while left < wanted or left % wanted:
                if position == len(source):
                    return None
                size, stride = source[position]
                if stride_end != size * stride:
                    return None
                left, stride_end = left * size, stride
                position += 1
                if left % wanted and left > wanted:
                    return None
            left //= wanted
            strides.append(left * stride_end)
        if left != 1 or position != len(source):
            return None
        return replace(self, extents=tuple(extents), strides=tuple(strides))

    def is_contiguous_from(self, axis: int) -> bool:
        """True when the axes from `axis` on are dense and in order."""
        expected = 1
        for extent, stride in reversed(self.axes_from(axis)):
            if stride != expected:
                return False
            expected *= extent.stand_in()
        return True

    def axes_from(self, axis: int) -> list[tuple[Extent, int]]:
        """(extent, stride) of the axes from `axis` on, without axes of 1."""
        pairs = list(zip(self.extents, self.strides, strict=True))[axis:]
        return [(e, s) for e, s in pairs if not e.is_one]


def row_major(extents: Sequence[Extent]) -> tuple[int, ...]:
    """Dense strides with the symbolic axis slowest and the others in their order.

    At most one axis may be symbolic, so that no stride depends on a symbol.
    """
    plain = [i for i, e in enumerate(extents) if e.sym is Sym.SYM_ONE]
    symbolic = [i for i, e in enumerate(extents) if e.sym is not Sym.SYM_ONE]
    if len(symbolic) > 1:
        raise ValueError(f"{len(symbolic)} symbolic axes in one tensor")
    strides = [0] * len(extents)
    running = 1
    for i in reversed(plain):
        if not extents[i].is_one:
            strides[i] = running
            running *= extents[i].mult
    for i in symbolic:
        strides[i] = running
    return tuple(strides)


def total(extents: Sequence[Extent], itemsize: int) -> Extent:
    """Bytes of a dense tensor; at most one axis may be symbolic."""
    sym = next((e.sym for e in extents if e.sym is not Sym.SYM_ONE), Sym.SYM_ONE)
    return Extent(math.prod(e.mult for e in extents) * itemsize, sym)
