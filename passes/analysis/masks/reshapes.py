"""Mask rules of reshapes: axes of size 1, axes folded into one, an axis taken apart.

An index of a folded axis is inner_sizes * outer + inner, that of a part is `x // inner % size`.
Going there and back gives the same index again: what the sizes bound is known here (`bounded`).
Other reshapes cut across axes and are not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks.algebra import Expr, Var
from graphopt.passes.analysis.masks.values import MaskValues, axis


def reshape(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    """See the module docstring."""
    assert isinstance(node.args[0], fx.Node)
    grid, one = values.of(node.args[0]), ia.integer(1)
    old = [(size, axis(i)) for i, size in enumerate(grid.sizes) if size != one]
    new = [(size, axis(i)) for i, size in enumerate(sizes) if size != one]
    moves: dict[Var, Expr] = {axis(i): ia.integer(0) for i in range(len(grid.sizes))}
    while old and new:
        if old[0][0] == new[0][0]:
            moves[old[0][1]] = new[0][1]
            old, new = old[1:], new[1:]
            continue
        folded = _prefix(old, new[0][0])
        if folded:
            moves |= _parts(old[:folded], new[0][1])
            old, new = old[folded:], new[1:]
            continue
        apart = _prefix(new, old[0][0])
        if not apart:
            return None
        moves[old[0][1]] = _folded(new[:apart])
        old, new = old[1:], new[apart:]
    return None if old or new else bounded(ia.substitute(grid.element, moves), limits(sizes))


def _prefix(axes: Sequence[tuple[Expr, Var]], size: Expr) -> int:
    """How many of the first axes make one of `size` together; 0 when none do. All but one of their
    sizes are numbers, and so are all but the first, by which indices are divided."""
    product = axes[0][0]
    for i, (inner, _) in enumerate(axes[1:], 2):
        if not isinstance(inner, ia.Num):
            return 0
        product = ia.times(product, int(inner.value))
        if product == size:
            return i
    return 0


def _parts(axes: Sequence[tuple[Expr, Var]], index: Expr) -> dict[Var, Expr]:
    """Indices of the axes that `index` goes through, row by row."""
    found: dict[Var, Expr] = {}
    for size, variable in reversed(axes[1:]):
        found[variable] = ia.remainder(index, _number(size))
        index = ia.floor_divide(index, _number(size))
    return {**found, axes[0][1]: index}


def _folded(axes: Sequence[tuple[Expr, Var]]) -> Expr:
    """The index in the one axis that some axes make."""
    index: Expr = axes[0][1]
    for size, variable in axes[1:]:
        index = ia.add(ia.times(index, _number(size)), variable)
    return index


def _number(size: Expr) -> int:
    assert isinstance(size, ia.Num)
    return int(size.value)


def limits(sizes: Sequence[Expr]) -> dict[Var, Expr]:
    """The largest index of each axis."""
    return {axis(i): ia.add(size, ia.integer(-1)) for i, size in enumerate(sizes)}


def bounded(e: Expr, largest: Mapping[Var, Expr]) -> Expr:
    """The expression without divisions of what is smaller than the divisor."""
    if isinstance(e, (ia.Num, Var)):
        return e
    if isinstance(e, ia.Read):
        return ia.Read(e.tensor, tuple(bounded(i, largest) for i in e.indices), e.kind)
    if isinstance(e, ia.Sum):
        total: Expr = ia.integer(e.constant)
        for atom, coefficient in e.terms:
            total = ia.add(total, bounded(atom, largest), coefficient)
        return total
    args = tuple(bounded(a, largest) for a in e.args)
    if e.op == "floordiv":
        rest = ia.add(ia.add(args[1], ia.integer(-1)), args[0], -1)
        lows = ia.smallest(args[0], largest), ia.smallest(rest, largest)
        if all(low is not None and low >= 0 for low in lows):
            return ia.integer(0)
    return ia.rebuild(e.op, args)
