"""Which axis of each value enumerates token rows, and which ops keep rows apart.

`trace_rows.py` gives every node
    an axis number   the value holds one slice per token row along that axis
    None             the value does not depend on the tokens
A rule raises `RowsMixedError` when its op lets one row see another. Attention is the only op that
may, and only when it is causal over the same rows. Batch items are independent requests, so the
batch size counts as 1 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graphopt.ir.graph import argument, op_name, shape_of, tensor_inputs
from graphopt.ops import (
    attention,
    embedding_wq,
    geglu,
    linear_wq,
    rms_norm,
    rope,
    swiglu,
)

aten = torch.ops.aten
Axis = int | None


class RowsMixedError(Exception):
    """Some op mixes token rows, or cannot be shown not to."""

    def __init__(self, code: str, text: str, node: fx.Node) -> None:
        super().__init__(text)
        self.code, self.text, self.node = code, text, node


class Rows:
    """State of one walk: the row axis of each node seen so far, and the sequence symbol."""

    def __init__(self, sequence: sympy.Expr, batch: sympy.Expr | None) -> None:
        self.axis: dict[fx.Node, Axis] = {}
        self.sequence = sequence
        self._batch = batch

    def size(self, value: Any) -> sympy.Expr:
        """A size as an expression, with batch = 1."""
        expr = value.node.expr if isinstance(value, torch.SymInt) else sympy.sympify(value)
        return expr if self._batch is None else expr.subs(self._batch, 1)

    def sizes(self, node: fx.Node) -> list[sympy.Expr]:
        """The sizes of a tensor node, with batch = 1."""
        return [self.size(s) for s in shape_of(node)]

    def of(self, value: Any) -> Axis:
        """Row axis of an operand; constants have none."""
        return self.axis.get(value) if isinstance(value, fx.Node) else None


Rule = Callable[[Rows, fx.Node], Axis]


def mixed(node: fx.Node, what: str) -> RowsMixedError:
    """The refusal for an op that is known to mix rows."""
    return RowsMixedError("rows-mixed", f"{op_name(node)} {what}", node)


def _rank(value: Any) -> int:
    return len(value.meta["val"].shape)


def pointwise(rows: Rows, node: fx.Node) -> Axis:
    out_rank = _rank(node)
    found: int | None = None
    for operand in node.all_input_nodes:
        axis = rows.of(operand)
        if axis is None:
            continue
        aligned = axis + out_rank - _rank(operand)
        if found is not None and found != aligned:
            raise mixed(node, "pairs every token row with every other (an outer operation)")
        found = aligned
    return found


def _same_axis(rows: Rows, node: fx.Node) -> Axis:
    return rows.of(node.args[0])


def _reduction(rows: Rows, node: fx.Node) -> Axis:
    axis = rows.of(node.args[0])
    if axis is None:
        return None
    bound = tensor_inputs(node)
    rank = _rank(node.args[0])
    dims = bound.get("dim")
    listed = [dims] if isinstance(dims, int) else dims
    if not listed:
        raise mixed(node, "reduces over all token rows")
    reduced = {d % rank for d in listed}
    if axis in reduced:
        raise mixed(node, "works along the token axis")
    keeps = bool(bound.get("keepdim", False)) or _rank_of_result(node) == rank
    return axis if keeps else axis - sum(1 for d in reduced if d < axis)


def _rank_of_result(node: fx.Node) -> int:
    value = node.meta["val"]
    return len((value if isinstance(value, Tensor) else value[0]).shape)


def _along_dim(rows: Rows, node: fx.Node) -> Axis:
    """Ops that work along one `dim` and keep the rank: softmax, cumsum, sort, topk, flip, roll."""
    axis = rows.of(node.args[0])
    bound = tensor_inputs(node)
    dims = bound.get("dim", bound.get("dims", -1))
    rank = _rank(node.args[0])
    if axis is not None and axis in {
        d % rank for d in (dims if isinstance(dims, list) else [dims])
    }:
        raise mixed(node, "works along the token axis")
    return axis


def _last_axes(rows: Rows, node: fx.Node) -> Axis:
    """Norms over trailing axes."""
    axis = rows.of(node.args[0])
    shape = tensor_inputs(node).get("normalized_shape", [0])
    if axis is not None and axis >= _rank(node.args[0]) - len(shape):
        raise mixed(node, "normalises over the token axis")
    return axis


def _linear(rows: Rows, node: fx.Node) -> Axis:
    axis = rows.of(node.args[0])
    if any(rows.of(operand) is not None for operand in node.args[1:]):
        raise mixed(node, "uses token rows as a weight")
    if axis is not None and axis == _rank(node.args[0]) - 1:
        raise mixed(node, "sums over the token axis")
    return axis


def _addmm(rows: Rows, node: fx.Node) -> Axis:
    bias, left, right = node.args[:3]
    if rows.of(bias) is not None or rows.of(right) is not None:
        raise mixed(node, "uses token rows as a weight")
    if rows.of(left) == 1:
        raise mixed(node, "sums over the token axis")
    return rows.of(left)


def _matmul(rows: Rows, node: fx.Node) -> Axis:
    left, right = node.args[:2]
    left_axis, right_axis = rows.of(left), rows.of(right)
    out_rank = _rank(node)
    if left_axis is not None and right_axis is not None:
        raise mixed(node, "multiplies token rows with each other (unrecognised attention?)")
    if left_axis is not None:
        if left_axis == _rank(left) - 1:
            raise mixed(node, "sums over the token axis")
        return left_axis + out_rank - _rank(left)
    if right_axis is not None:
        if right_axis == _rank(right) - 2:
            raise mixed(node, "sums over the token axis")
        return right_axis + out_rank - _rank(right)
    return None


def _embedding(rows: Rows, node: fx.Node) -> Axis:
    bound = tensor_inputs(node)
    ids = bound.get("indices", bound.get("ids"))
    if rows.of(bound.get("weight")) is not None:
        raise mixed(node, "looks tokens up in a table made of token rows")
    return rows.of(ids)


def _transpose(rows: Rows, node: fx.Node) -> Axis:
    axis = rows.of(node.args[0])
    if axis is None:
        return None
    rank = _rank(node)
    first, second = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
    return {first: second, second: first}.get(axis, axis)


def _permute(rows: Rows, node: fx.Node) -> Axis:
    axis = rows.of(node.args[0])
    order = [int(d) % _rank(node) for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    return None if axis is None else order.index(axis)


def _unsqueeze(rows: Rows, node: fx.Node) -> Axis:
    axis = rows.of(node.args[0])
    inserted = int(node.args[1]) % _rank(node)  # type: ignore[arg-type]
    return None if axis is None else axis + (inserted <= axis)


def _squeeze(rows: Rows, node: fx.Node) -> Axis:
    axis = rows.of(node.args[0])
    if axis is None:
        return None
    rank = _rank(node.args[0])
    dims = node.args[1]
    removed = {d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}  # type: ignore[operator]
    if axis in removed:
        raise mixed(node, "drops the token axis")
    return axis - sum(1 for d in removed if d < axis)


def _select(rows: Rows, node: fx.Node) -> Axis:
    axis = rows.of(node.args[0])
    dim = int(argument(node, "dim")) % _rank(node.args[0])
    if axis == dim:
        raise mixed(node, "picks one token row by its index")
    return None if axis is None else axis - (dim < axis)


def _slice(rows: Rows, node: fx.Node) -> Axis:
    axis = rows.of(node.args[0])
    dim = int(argument(node, "dim")) % _rank(node.args[0])
    whole = rows.sizes(node)[dim] == rows.sizes(node.args[0])[dim]  # type: ignore[arg-type]
    if axis == dim and not whole:
        raise mixed(node, "cuts a range out of the token axis")
    return axis


def _concatenate(rows: Rows, node: fx.Node) -> Axis:
    axes = {rows.of(part) for part in node.args[0]}  # type: ignore[union-attr]
    if axes == {None}:
        return None
    if len(axes) > 1:
        raise mixed(node, "joins token rows with values that are not token rows")
    (axis,) = axes
    dim = int(argument(node, "dim")) % _rank(node)
    stacked = node.target is aten.stack.default
    if axis == dim and not stacked:
        raise mixed(node, "concatenates along the token axis")
    return axis + (stacked and dim <= axis) if axis is not None else None


def _split(rows: Rows, node: fx.Node) -> Axis:
    axis = rows.of(node.args[0])
    dim = int(argument(node, "dim")) % _rank(node.args[0])
    if axis == dim:
        raise mixed(node, "splits the token axis")
    if node.target is aten.unbind.int:
        return None if axis is None else axis - (dim < axis)
    return axis


def _expand(rows: Rows, node: fx.Node) -> Axis:
    axis = rows.of(node.args[0])
    return None if axis is None else axis + _rank(node) - _rank(node.args[0])


def _repeat_interleave(rows: Rows, node: fx.Node) -> Axis:
    axis = rows.of(node.args[0])
    dim = argument(node, "dim")
    if axis is not None and (dim is None or int(dim) % _rank(node.args[0]) == axis):
        raise mixed(node, "repeats token rows")
    return axis


def _reshape(rows: Rows, node: fx.Node) -> Axis:
    axis = rows.of(node.args[0])
    if axis is None:
        return None
    before, after = rows.sizes(node.args[0]), rows.sizes(node)  # type: ignore[arg-type]
    prefix = math.prod(before[:axis])
    for position, size in enumerate(after):
        if size == rows.sequence and math.prod(after[:position]) == prefix:
            return position
    raise mixed(node, "folds the token axis into another axis")


def filled(rows: Rows, node: fx.Node) -> Axis:
    """zeros/ones/full: constant along the token axis when they have one."""
    sizes = rows.sizes(node)
    places = [i for i, size in enumerate(sizes) if size == rows.sequence]
    if len(places) > 1:
        raise mixed(node, "builds a table with two token axes")
    return places[0] if places else None


def _arange(rows: Rows, node: fx.Node) -> Axis:
    sizes = rows.sizes(node)
    if not any(rows.sequence in size.free_symbols for size in sizes):
        return None
    start = tensor_inputs(node).get("start", 0)
    step = tensor_inputs(node).get("step", 1)
    if sizes != [rows.sequence] or start != 0 or step != 1:
        raise mixed(node, "counts something other than 0, 1, .. over the token axis")
    return 0


def _convolution(rows: Rows, node: fx.Node) -> Axis:
    if rows.of(node.args[0]) is not None and rows.of(node.args[0]) >= 2:  # type: ignore[operator]
        raise mixed(node, "slides over the token axis, so a row depends on its neighbours")
    raise mixed(node, "convolves token rows in a way that is not analysed")


def _attention(rows: Rows, node: fx.Node) -> Axis:
    q, k, v = (argument(node, name) for name in ("q_BHSD", "k_BGTD", "v_BGTE"))
    if {rows.of(q), rows.of(k), rows.of(v)} == {None}:
        return None
    if not {rows.of(q), rows.of(k), rows.of(v)} == {2}:
        raise mixed(node, "attends from token rows to something else (cross-attention)")
    if not argument(node, "causal"):
        raise mixed(node, "is bidirectional: later tokens change earlier ones")
    if argument(node, "mask") is not None:
        raise mixed(node, "has a dense mask whose meaning is not proven")
    return 2


def _rope(rows: Rows, node: fx.Node) -> Axis:
    axis = rows.of(node.args[0])
    for table in node.args[1:3]:
        if rows.of(table) not in (None, 1):
            raise mixed(node, "has angle tables with tokens on another axis")
    if axis not in (None, 2):
        raise mixed(node, "has its tokens on another axis")
    return axis


RULES: dict[object, Rule] = {
    aten.linear.default: _linear,
    linear_wq.SPEC.overload: _linear,
    aten.addmm.default: _addmm,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.matmul.default: _matmul,
    aten.embedding.default: _embedding,
    embedding_wq.SPEC.overload: _embedding,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.cat.default: _concatenate,
    aten.stack.default: _concatenate,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.unbind.int: _split,
    aten.expand.default: _expand,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.reshape.default: _reshape,
    aten.view.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.zeros.default: filled,
    aten.ones.default: filled,
    aten.full.default: filled,
    aten.layer_norm.default: _last_axes,
    aten.native_layer_norm.default: _last_axes,
    rms_norm.SPEC.overload: _last_axes,
    aten.to.dtype: pointwise,
    aten.to.device: pointwise,
    aten.to.dtype_layout: pointwise,
    aten.to.other: pointwise,
    aten._to_copy.default: pointwise,
    aten.clone.default: pointwise,
    aten.dropout.default: pointwise,
    swiglu.SPEC.overload: pointwise,
    geglu.SPEC.overload: pointwise,
    attention.SPEC.overload: _attention,
    rope.SPEC.overload: _rope,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.convolution.default: _convolution,
    aten.contiguous.default: _same_axis,
    aten.mean.dim: _reduction,
    aten.sum.dim_IntList: _reduction,
    aten.amax.default: _reduction,
    aten.amin.default: _reduction,
    aten.argmax.default: _reduction,
    aten.var.correction: _reduction,
    aten.softmax.int: _along_dim,
    aten._softmax.default: _along_dim,
    aten.log_softmax.int: _along_dim,
    aten.cumsum.default: _along_dim,
    aten.topk.default: _along_dim,
    aten.sort.default: _along_dim,
    aten.flip.default: _along_dim,
}
