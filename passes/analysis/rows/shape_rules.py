"""Row rules of the ops that only move, cut, join or repeat axes. See `row_layout.py`."""

from __future__ import annotations

import torch
from torch import fx

from graphopt.ir.graph import argument, axis_of, tensor_inputs
from graphopt.passes.analysis.rows.layout import (
    Axis,
    Rows,
    Rule,
    Table,
    batch_mixed,
    mixed,
    rank,
    refuse_along,
    reshaped,
    sizes,
)

aten = torch.ops.aten


def _moved(rows: Rows, node: fx.Node) -> Axis:
    """Ops that give every axis a new place (transpose, permute, movedim, unsqueeze): tried out on a
    tensor without data whose sizes are all different."""
    operand = node.args[0]
    axis = rows.of(operand)
    if axis is None:
        return None
    assert callable(node.target)
    probe = torch.empty(tuple(range(2, 2 + rank(operand))), device="meta")
    return list(node.target(probe, *node.args[1:], **node.kwargs).shape).index(2 + axis)


def _squeeze(rows: Rows, node: fx.Node) -> Axis:
    operand, dims = node.args[0], argument(node, "dim")
    before = sizes(operand)
    listed = [
        axis_of(d, len(before)) for d in (dims if isinstance(dims, (list, tuple)) else [dims])
    ]
    # A step may hold one row, and holds one batch item: there the axis would vanish.
    refuse_along(rows, node, operand, listed, "may drop")
    axis = rows.of(operand)
    return None if axis is None else axis - sum(before[d] == 1 for d in set(listed) if d < axis)


def _select(rows: Rows, node: fx.Node) -> Axis:
    operand = node.args[0]
    dim = axis_of(argument(node, "dim"), rank(operand))
    refuse_along(rows, node, operand, [dim], "picks one index of")
    axis = rows.of(operand)
    return None if axis is None else axis - (dim < axis)


def _slice(rows: Rows, node: fx.Node) -> Axis:
    operand = node.args[0]
    axis, dim = rows.of(operand), axis_of(argument(node, "dim"), rank(operand))
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
    dim = axis_of(argument(node, "dim"), rank(node))
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
    dim = axis_of(argument(node, "dim"), rank(operand))
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
    counts = argument(node, "dims" if node.target is aten.tile.default else "repeats")
    counts = [*[1] * (rank(node) - len(counts)), *counts]
    added = rank(node) - rank(operand)
    repeated = [i - added for i, count in enumerate(counts) if i >= added and count != 1]
    refuse_along(rows, node, operand, repeated, "repeats")
    axis = rows.of(operand)
    return filled(rows, node) if axis is None else axis + added


def _repeat_interleave(rows: Rows, node: fx.Node) -> Axis:
    operand, dim = node.args[0], argument(node, "dim")
    refuse_along(rows, node, operand, range(rank(operand)) if dim is None else [dim], "repeats")
    return rows.of(operand)


def reshape(rows: Rows, node: fx.Node) -> Axis:
    operand = node.args[0]
    if rows.is_constant(operand):
        return None
    before, is_turned = sizes(operand), operand in rows.sequence_first
    try:
        axis, is_turned = reshaped(rows, before, sizes(node), is_sequence_first=is_turned)
    except ValueError:
        raise mixed(node, "folds the token axis or the batch axis into another axis") from None
    if is_turned:
        rows.sequence_first.add(node)
    return axis


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


def _pad(rows: Rows, node: fx.Node) -> Axis:
    """Pairs of (before, after), from the last axis on."""
    amounts = argument(node, "pad")
    padded = [-1 - i // 2 for i, amount in enumerate(amounts) if amount != 0]
    refuse_along(rows, node, node.args[0], padded, "pads or shifts along")
    return rows.of(node.args[0])


def _triangle(rows: Rows, node: fx.Node) -> Axis:
    refuse_along(rows, node, node.args[0], [-2, -1], "cuts a triangle out of")
    return rows.of(node.args[0])


def _squeeze_all(rows: Rows, node: fx.Node) -> Axis:
    refuse_along(rows, node, node.args[0], range(rank(node.args[0])), "may drop")
    return None


SHAPE_RULES: dict[object, Rule] = {
    aten.transpose.int: _moved,
    aten.swapaxes.default: _moved,
    aten.swapdims.default: _moved,
    aten.permute.default: _moved,
    aten.movedim.int: _moved,
    aten.movedim.intlist: _moved,
    aten.moveaxis.int: _moved,
    aten.moveaxis.intlist: _moved,
    aten.t.default: _moved,
    aten.numpy_T.default: _moved,
    aten.mT.default: _moved,
    aten.unsqueeze.default: _moved,
    aten.squeeze.default: _squeeze_all,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.narrow.default: _slice,
    aten.cat.default: _concatenate,
    aten.stack.default: _concatenate,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.unsafe_split.Tensor: _split,
    aten.unsafe_split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.unsafe_chunk.default: _split,
    aten.tensor_split.sections: _split,
    aten.tensor_split.indices: _split,
    aten.unbind.int: _split,
    aten.expand.default: _expand,
    aten.expand_as.default: _expand,
    aten.broadcast_to.default: _expand,
    aten.repeat.default: _repeat,
    aten.tile.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.tril.default: _triangle,
    aten.triu.default: _triangle,
    aten.reshape.default: reshape,
    aten.reshape_as.default: reshape,
    aten.view_as.default: reshape,
    aten.view.default: reshape,
    aten._unsafe_view.default: reshape,
    aten.flatten.using_ints: reshape,
    aten.unflatten.int: reshape,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.zeros.default: filled,
    aten.ones.default: filled,
    aten.full.default: filled,
    aten.new_zeros.default: filled,
    aten.new_ones.default: filled,
    aten.new_full.default: filled,
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
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_full.default,
        aten.broadcast_to.default,
        aten.slice.Tensor,
        aten.narrow.default,
        aten.split_with_sizes.default,
        aten.split.Tensor,
    }
)
