"""Mask rules of ops that make tensors, move axes and pick elements; see `values.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from graphopt.ir.graph import argument, axis_of, dtype_of, is_call
from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks.algebra import Expr, Var
from graphopt.passes.analysis.masks.arithmetic import float_leaf, overloads
from graphopt.passes.analysis.masks.reshapes import bounded, limits, reshape
from graphopt.passes.analysis.masks.values import (
    PRODUCT,
    Grid,
    MaskValues,
    Rule,
    argument_or,
    as_kind,
    axis,
    kind,
)

aten = torch.ops.aten


def _constant(value: float) -> Rule:
    def rule(values: MaskValues, node: fx.Node, _: tuple[Expr, ...]) -> Expr | None:
        return as_kind(values, ia.number(value), kind(dtype_of(node)), dtype_of(node))

    return rule


def _full(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    name = "s" if is_call(node, aten.scalar_tensor.default) else "fill_value"
    filled = values.element(argument(node, name), sizes)
    if filled is None:
        return None
    return as_kind(values, filled, kind(dtype_of(node)), dtype_of(node))


def _iota(values: MaskValues, node: fx.Node, _: tuple[Expr, ...]) -> Expr | None:
    start = values.operand(argument_or(node, "start", 0))
    step = argument_or(node, "step", 1)
    if start is None or not isinstance(step, int) or ia.kind_of(start.element) != "int":
        return None
    index = ia.add(start.element, axis(0), step)
    return as_kind(values, index, kind(dtype_of(node)), dtype_of(node))


def _same(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    """Casts, copies, broadcasts."""
    x = values.element(node.args[0], sizes)
    return None if x is None else as_kind(values, x, kind(dtype_of(node)), dtype_of(node))


def _product_and_more(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    """baddbmm: beta * what it adds + its product, see `values.py`. The factor of the product is
    not part of it."""
    beta, more = values.operand(argument(node, "beta")), values.element(node.args[0], sizes)
    if beta is None or more is None or not isinstance(beta.element, ia.Num):
        return None
    one = ia.integer(1)
    at = tuple(ia.integer(0) if size == one else axis(i) for i, size in enumerate(sizes))
    product = ia.Read(node.name + PRODUCT, at, kind(dtype_of(node)))
    factor = ia.real(float(beta.element.value))
    if factor == ia.real(0):
        # By definition not even a NaN is added then.
        return product
    added = ia.over_leaves(more, lambda leaf: float_leaf("mul", leaf, factor))
    return ia.over_leaves(added, lambda leaf: float_leaf("add", product, leaf))


def _repeat(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    """Whole copies, one behind the other."""
    assert isinstance(node.args[0], fx.Node)
    grid = values.of(node.args[0])
    moves: dict[Var, Expr] = {}
    for old, size in enumerate(grid.sizes):
        new = old + len(sizes) - len(grid.sizes)
        moves[axis(old)] = axis(new)
        if isinstance(size, ia.Num):
            moves[axis(old)] = ia.remainder(axis(new), int(size.value))
        elif size != sizes[new]:
            return None
    return bounded(ia.substitute(grid.element, moves), limits(sizes))


def _repeat_each(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    """Every element several times."""
    assert isinstance(node.args[0], fx.Node)
    dim, times = argument(node, "dim"), argument(node, "repeats")
    if not isinstance(dim, int) or not isinstance(times, int) or times <= 0:
        return None
    at = axis(axis_of(dim, len(sizes)))
    return ia.substitute(values.of(node.args[0]).element, {at: ia.floor_divide(at, times)})


def _flip(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    assert isinstance(node.args[0], fx.Node)
    moves: dict[Var, Expr] = {}
    if not sizes:
        return values.of(node.args[0]).element
    for dim in (axis_of(d, len(sizes)) for d in argument(node, "dims")):
        moves[axis(dim)] = ia.add(ia.add(sizes[dim], ia.integer(-1)), axis(dim), -1)
    return ia.substitute(values.of(node.args[0]).element, moves)


def _dropout(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    is_on = argument(node, "train") and argument(node, "p")
    return None if is_on else _same(values, node, sizes)


def _with_axes(rule: Rule) -> Rule:
    """A rule that counts axes. torch takes 0 and -1 of a tensor that has none."""

    def checked(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
        return rule(values, node, sizes) if sizes else None

    return checked


def _moved(values: MaskValues, node: fx.Node, order: Sequence[int]) -> Expr:
    """Axis i of the result is axis order[i] of the operand."""
    assert isinstance(node.args[0], fx.Node)
    element = values.of(node.args[0]).element
    return ia.substitute(element, {axis(old): axis(new) for new, old in enumerate(order)})


def _permute(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    return _moved(values, node, [axis_of(d, len(sizes)) for d in argument(node, "dims")])


def _transpose(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    rank = len(sizes)
    if not rank:
        return _moved(values, node, ())
    order = list(range(rank))
    dims = (
        (0, 1)
        if is_call(node, aten.t.default)
        else (argument(node, "dim0"), argument(node, "dim1"))
    )
    a, b = (axis_of(d, rank) for d in dims)
    order[a], order[b] = b, a
    return _moved(values, node, order)


def _slice(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    assert isinstance(node.args[0], fx.Node)
    grid = values.of(node.args[0])
    dim, step = axis_of(argument(node, "dim"), len(sizes)), argument(node, "step")
    begin = argument(node, "start")
    start = Grid((), ia.integer(0)) if begin is None else values.operand(begin)
    if start is None or not isinstance(step, int):
        return None
    first = start.element
    if isinstance(first, ia.Num) and first.value < 0:
        first = ia.add(grid.sizes[dim], first)
        if isinstance(first, ia.Num):
            # Before the first element there is none.
            first = ia.integer(max(int(first.value), 0))
    return ia.substitute(grid.element, {axis(dim): ia.add(first, axis(dim), step)})


def _select(values: MaskValues, node: fx.Node, _: tuple[Expr, ...]) -> Expr | None:
    assert isinstance(node.args[0], fx.Node)
    grid = values.of(node.args[0])
    dim = axis_of(argument(node, "dim"), len(grid.sizes))
    index = values.operand(argument(node, "index"))
    if index is None:
        return None
    at = index.element
    if isinstance(at, ia.Num) and at.value < 0:
        at = ia.add(grid.sizes[dim], at)
    later = {axis(i): axis(i - 1) for i in range(dim + 1, len(grid.sizes))}
    return ia.substitute(grid.element, {**later, axis(dim): at})


def _index_select(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    assert isinstance(node.args[0], fx.Node)
    if not sizes:
        return None
    dim = axis_of(argument(node, "dim"), len(sizes))
    # A negative index is an error there, so none needs to be ruled out here.
    at = values.element(argument(node, "index"), (sizes[dim],))
    if at is None or ia.kind_of(at) != "int":
        return None
    moved = ia.substitute(at, {axis(0): axis(dim)})
    return ia.substitute(values.of(node.args[0]).element, {axis(dim): moved})


def _index(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    """x[:, i, j]: index tensors on neighbouring axes, broadcast together."""
    assert isinstance(node.args[0], fx.Node)
    grid = values.of(node.args[0])
    indices = list(argument(node, "indices"))
    used = [d for d, index in enumerate(indices) if index is not None]
    if used != list(range(used[0], used[-1] + 1)):
        return None
    rank_of_indices = max(len(values.of(indices[d]).sizes) for d in used)
    first, last = used[0], used[-1]
    block = tuple(sizes[first : first + rank_of_indices])
    moves: dict[Var, Expr] = {}
    for d in range(last + 1, len(grid.sizes)):
        moves[axis(d)] = axis(d - len(used) + rank_of_indices)
    shifted: dict[Var, Expr] = {axis(i): axis(i + first) for i in range(rank_of_indices)}
    for d in used:
        at = values.element(indices[d], block)
        if at is None or ia.kind_of(at) != "int":
            return None
        low = ia.smallest(at, {})
        if low is None or low < 0:
            # A negative index would count from the end.
            return None
        moves[axis(d)] = ia.substitute(at, shifted)
    return ia.substitute(grid.element, moves)


def _concatenate(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    parts = [values.of(part) for part in argument(node, "tensors")]
    dim = axis_of(argument(node, "dim"), len(sizes))
    position = axis(dim)
    offset: Expr = ia.integer(0)
    pieces: list[tuple[Expr, Expr]] = []
    for part in parts:
        moved = ia.substitute(part.element, {position: ia.add(position, offset, -1)})
        offset = ia.add(offset, part.sizes[dim])
        element = as_kind(values, moved, kind(dtype_of(node)), dtype_of(node))
        if element is None:
            return None
        pieces.append((ia.less_equal(ia.add(position, ia.integer(1)), offset), element))
    result = pieces[-1][1]
    for condition, element in reversed(pieces[:-1]):
        result = ia.choose(condition, element, result)
    return result


def _difference(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    """torch.diff once, with something put before."""
    assert isinstance(node.args[0], fx.Node)
    x, dim = values.of(node.args[0]).element, axis_of(argument(node, "dim"), len(sizes))
    before = argument(node, "prepend")
    if argument(node, "n") != 1 or argument(node, "append") is not None:
        return None
    if ia.kind_of(x) != "int":
        return None
    position = axis(dim)
    earlier = ia.substitute(x, {position: ia.add(position, ia.integer(-1))})
    if before is None:
        later = ia.substitute(x, {position: ia.add(position, ia.integer(1))})
        return ia.add(later, x, -1)
    grid = values.of(before)
    if grid.sizes[dim] != ia.integer(1) or ia.kind_of(grid.element) != "int":
        return None
    first = ia.add(ia.substitute(x, {position: ia.integer(0)}), grid.element, -1)
    others = ia.add(x, earlier, -1)
    return ia.choose(ia.less_equal(position, ia.integer(0)), first, others)


def _cumulative_sum(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    """Of a whole number."""
    assert isinstance(node.args[0], fx.Node)
    element = values.of(node.args[0]).element
    if isinstance(element, ia.Num) and not float(element.value).is_integer():
        return None
    x = as_kind(values, element, "int", torch.int64)
    dim = axis_of(argument(node, "dim"), len(sizes))
    if not isinstance(x, ia.Num) or not sizes:
        return None
    total = ia.times(ia.add(axis(dim), ia.integer(1)), int(x.value))
    return as_kind(values, total, kind(dtype_of(node)), dtype_of(node))


MOVING: dict[object, Rule] = {
    **dict.fromkeys(
        (aten.ones.default, aten.ones_like.default, aten.new_ones.default), _constant(1)
    ),
    **dict.fromkeys(
        (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), _constant(0)
    ),
    **dict.fromkeys(
        (
            aten.full.default,
            aten.full_like.default,
            aten.new_full.default,
            aten.scalar_tensor.default,
        ),
        _full,
    ),
    **dict.fromkeys(overloads(aten.arange), _iota),
    **dict.fromkeys(
        (
            aten.to.dtype,
            aten.to.dtype_layout,
            aten.to.device,
            aten.to.other,
            aten._to_copy.default,
            aten.type_as.default,
            aten.clone.default,
            aten.contiguous.default,
            aten.alias.default,
            aten.detach.default,
            aten.detach_.default,
            aten.lift_fresh_copy.default,
            aten.expand.default,
            aten.expand_as.default,
        ),
        _same,
    ),
    aten.baddbmm.default: _product_and_more,
    aten.dropout.default: _dropout,
    aten.permute.default: _permute,
    aten.transpose.int: _with_axes(_transpose),
    aten.t.default: _with_axes(_transpose),
    **dict.fromkeys(
        (
            aten.view.default,
            aten.reshape.default,
            aten._unsafe_view.default,
            aten.unsqueeze.default,
            aten.flatten.using_ints,
            aten.unflatten.int,
            *overloads(aten.squeeze),
        ),
        reshape,
    ),
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _with_axes(_repeat_each),
    aten.flip.default: _with_axes(_flip),
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.index.Tensor: _index,
    aten.index_select.default: _with_axes(_index_select),
    aten.cat.default: _concatenate,
    aten.diff.default: _difference,
    aten.cumsum.default: _with_axes(_cumulative_sum),
}
