"""Row rules of the ops that only move, cut, join or repeat axes. See `row_layout.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from graphopt.ir.graph import argument, tensor_inputs
from graphopt.passes.cache.row_layout import (
    Axis,
    Rows,
    Table,
    batch_mixed,
    mixed,
    rank,
    refuse_along,
    reshaped,
    sizes,
)

aten = torch.ops.aten
Rule = Callable[[Rows, fx.Node], Axis]


def _same_axis(rows: Rows, node: fx.Node) -> Axis:
    return rows.of(node.args[0])


def _transpose(rows: Rows, node: fx.Node) -> Axis:
    axis = rows.of(node.args[0])
    if axis is None:
        return None
    first, second = (int(argument(node, name)) % rank(node) for name in ("dim0", "dim1"))
    return {first: second, second: first}.get(axis, axis)


def _permute(rows: Rows, node: fx.Node) -> Axis:
    axis = rows.of(node.args[0])
    order = [int(d) % rank(node) for d in argument(node, "dims")]
    return None if axis is None else order.index(axis)


def _unsqueeze(rows: Rows, node: fx.Node) -> Axis:
    axis = rows.of(node.args[0])
    inserted = int(argument(node, "dim")) % rank(node)
    return None if axis is None else axis + (inserted <= axis)


def _squeeze(rows: Rows, node: fx.Node) -> Axis:
    operand, dims = node.args[0], argument(node, "dim")
    before = sizes(operand)
    listed = [int(d) % len(before) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    # A step may hold one row, and holds one batch item: there the axis would vanish.
    refuse_along(rows, node, operand, listed, "may drop")
    axis = rows.of(operand)
    return None if axis is None else axis - sum(before[d] == 1 for d in set(listed) if d < axis)


def _select(rows: Rows, node: fx.Node) -> Axis:
    operand = node.args[0]
    dim = int(argument(node, "dim")) % rank(operand)
    refuse_along(rows, node, operand, [dim], "picks one index of")
    axis = rows.of(operand)
    return None if axis is None else axis - (dim < axis)


def _slice(rows: Rows, node: fx.Node) -> Axis:
    operand = node.args[0]
    axis, dim = rows.of(operand), int(argument(node, "dim")) % rank(operand)
    length = sizes(node)[dim]
    if length == sizes(operand)[dim]:
        return axis
    refuse_along(rows, node, operand, [dim], "cuts a range out of")
    if rows.batch in length.free_symbols:
        raise batch_mixed(node, "cuts a constant to the number of batch items")
    bound = tensor_inputs(node)
    start = bound.get("start") or 0
    has_plain_start = isinstance(start, int)
    if has_plain_start and rows.sequence not in length.free_symbols:
        return axis
    is_table = has_plain_start and start >= 0 and bound.get("step", 1) == 1
    if length != rows.sequence or axis is not None or not is_table:
        raise mixed(node, "cuts a range whose ends depend on the length of the sequence")
    rows.tables[node] = Table(dim, start)
    return dim


def _concatenate(rows: Rows, node: fx.Node) -> Axis:
    parts = argument(node, "tensors")
    dim = int(argument(node, "dim")) % rank(node)
    is_stack = node.target is aten.stack.default
    if not is_stack:
        for part in parts:
            refuse_along(rows, node, part, [dim], "joins values along")
    axes = {rows.of(part) for part in parts}
    if len(axes) > 1:
        raise mixed(node, "joins token rows with values that are not token rows")
    (axis,) = axes
    return None if axis is None else axis + (is_stack and dim <= axis)


def _split(rows: Rows, node: fx.Node) -> Axis:
    operand = node.args[0]
    dim = int(argument(node, "dim")) % rank(operand)
    refuse_along(rows, node, operand, [dim], "splits")
    axis = rows.of(operand)
    if axis is not None and node.target is aten.unbind.int:
        return axis - (dim < axis)
    return axis


def _expand(rows: Rows, node: fx.Node) -> Axis:
    axis = rows.of(node.args[0])
    if axis is None:
        return filled(rows, node)
    return axis + rank(node) - rank(node.args[0])


def _repeat(rows: Rows, node: fx.Node) -> Axis:
    operand = node.args[0]
    counts = argument(node, "repeats")
    added = rank(node) - rank(operand)
    repeated = [i - added for i, count in enumerate(counts) if i >= added and count != 1]
    refuse_along(rows, node, operand, repeated, "repeats")
    axis = rows.of(operand)
    return filled(rows, node) if axis is None else axis + added


def _repeat_interleave(rows: Rows, node: fx.Node) -> Axis:
    operand, dim = node.args[0], argument(node, "dim")
    refuse_along(rows, node, operand, range(rank(operand)) if dim is None else [dim], "repeats")
    return rows.of(operand)


def _reshape(rows: Rows, node: fx.Node) -> Axis:
    operand = node.args[0]
    if rows.is_constant(operand):
        return None
    try:
        return reshaped(rows, sizes(operand), sizes(node))
    except ValueError:
        raise mixed(node, "folds the token axis or the batch axis into another axis") from None


def filled(rows: Rows, node: fx.Node) -> Axis:
    """zeros, ones, full, and constants repeated: the same for every row."""
    places = [i for i, size in enumerate(sizes(node)) if rows.sequence in size.free_symbols]
    if len(places) > 1:
        raise mixed(node, "builds a table with two token axes")
    return places[0] if places else None


def _arange(rows: Rows, node: fx.Node) -> Axis:
    (size,) = sizes(node)
    if rows.batch in size.free_symbols:
        raise batch_mixed(node, "numbers the batch items")
    if rows.sequence not in size.free_symbols:
        return None
    bound = tensor_inputs(node)
    if size != rows.sequence or bound.get("start", 0) != 0 or bound.get("step", 1) != 1:
        raise mixed(node, "counts something other than 0, 1, .. over the token axis")
    return 0


SHAPE_RULES: dict[object, Rule] = {
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.narrow.default: _slice,
    aten.cat.default: _concatenate,
    aten.stack.default: _concatenate,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.unbind.int: _split,
    aten.expand.default: _expand,
    aten.expand_as.default: _expand,
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.reshape.default: _reshape,
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.zeros.default: filled,
    aten.ones.default: filled,
    aten.full.default: filled,
    aten.contiguous.default: _same_axis,
}

# The sequence length may reach these as a number: they only make shapes of it.
TAKES_SIZES = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.unflatten.int,
        aten.expand.default,
        aten.repeat.default,
        aten.arange.default,
        aten.arange.start,
        aten.arange.start_step,
        aten.zeros.default,
        aten.ones.default,
        aten.full.default,
        aten.slice.Tensor,
        aten.narrow.default,
        aten.split_with_sizes.default,
        aten.split.Tensor,
    }
)
