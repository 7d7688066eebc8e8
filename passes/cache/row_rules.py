"""Which axis of each value enumerates token rows, and which ops keep rows apart.

`trace_rows.py` gives every node
    an axis number   the value holds one slice per token row along that axis
    None             the value does not depend on the tokens
A rule raises `RowsMixedError` when its op lets one row see another, or one batch item another.
Attention is the only op that may, and only when it is causal over the same rows. Batch items are
independent requests. `row_layout.py` holds the terms, `row_shape_rules.py` the ops that move axes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from graphopt.ir.graph import argument, is_call, shape_of, tensor_inputs
from graphopt.ops import (
    attention,
    embedding_wq,
    layer_norm,
    linear_wq,
    predicate,
    rms_norm,
    rope,
)
from graphopt.ops.attention import NEGLIGIBLE
from graphopt.passes.cache.row_layout import (
    Axis,
    Rows,
    batch_mixed,
    mixed,
    rank,
    refuse_along,
    sizes,
)
from graphopt.passes.cache.row_shape_rules import SHAPE_RULES, Rule

aten = torch.ops.aten
# Same values, maybe in another dtype.
CASTS = (
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.clone.default,
)


def pointwise(rows: Rows, node: fx.Node) -> Axis:
    """Element by element, with broadcasting."""
    found: Axis = None
    for operand in node.all_input_nodes:
        axis = rows.of(operand)
        if axis is None:
            continue
        aligned = axis + rank(node) - rank(operand)
        if found is not None and found != aligned:
            raise mixed(node, "pairs every token row with every other (an outer operation)")
        found = aligned
    return found


def _reduction(rows: Rows, node: fx.Node) -> Axis:
    operand = node.args[0]
    if rows.is_constant(operand):
        return None
    bound = tensor_inputs(node)
    dims = bound.get("dim")
    listed = [dims] if isinstance(dims, int) else dims
    if not listed:
        raise mixed(node, "reduces over all token rows and batch items")
    refuse_along(rows, node, operand, listed, "works along")
    axis = rows.of(operand)
    before = rank(operand)
    value = node.meta["val"]
    after = len((value if isinstance(value, Tensor) else value[0]).shape)
    if axis is None or bound.get("keepdim", False) or after == before:
        return axis
    return axis - sum(1 for d in {d % before for d in listed} if d < axis)


def _along_dim(rows: Rows, node: fx.Node) -> Axis:
    """Ops that work along one `dim` and keep the rank: softmax, cumsum, sort, topk, flip."""
    operand = node.args[0]
    bound = tensor_inputs(node)
    dims = bound.get("dim", bound.get("dims", -1))
    listed = dims if isinstance(dims, (list, tuple)) else [dims]
    refuse_along(rows, node, operand, listed, "works along")
    return rows.of(operand)


def _last_axes(rows: Rows, node: fx.Node) -> Axis:
    """Norms over trailing axes."""
    operand = node.args[0]
    shape = tensor_inputs(node).get("normalized_shape", [0])
    refuse_along(rows, node, operand, range(-len(shape), 0), "normalises over")
    return rows.of(operand)


def _refuse_as_weight(rows: Rows, node: fx.Node, operands: list[object]) -> None:
    for operand in operands:
        if rows.of(operand) is not None:
            raise mixed(node, "uses token rows as a weight")
        if rows.batch_of(operand) is not None:
            raise batch_mixed(node, "uses batch items as a weight")


def _linear(rows: Rows, node: fx.Node) -> Axis:
    operand = node.args[0]
    _refuse_as_weight(rows, node, [n for n in node.all_input_nodes if n is not operand])
    refuse_along(rows, node, operand, [-1], "sums over")
    return rows.of(operand)


def _addmm(rows: Rows, node: fx.Node) -> Axis:
    bias, left, right = node.args[:3]
    _refuse_as_weight(rows, node, [bias, right])
    refuse_along(rows, node, left, [1], "sums over")
    return rows.of(left)


def _matmul(rows: Rows, node: fx.Node) -> Axis:
    left, right = node.args[:2]
    refuse_along(rows, node, left, [-1], "sums over")
    refuse_along(rows, node, right, [max(rank(right) - 2, 0)], "sums over")
    left_axis, right_axis = rows.of(left), rows.of(right)
    if left_axis is not None and right_axis is not None:
        raise mixed(node, "multiplies token rows with each other (unrecognised attention?)")
    # Counted from the end, an axis stays where it is; a vector operand removes the summed one.
    if left_axis is not None:
        return rank(node) - (rank(left) - left_axis - (rank(right) == 1))
    if right_axis is not None:
        from_end = rank(right) - right_axis
        return rank(node) - (from_end - (rank(left) == 1 and from_end > 1))
    return None


def _embedding(rows: Rows, node: fx.Node) -> Axis:
    bound = tensor_inputs(node)
    ids = bound.get("indices", bound.get("ids"))
    _refuse_as_weight(rows, node, [n for n in node.all_input_nodes if n is not ids])
    return rows.of(ids)


def _gather(rows: Rows, node: fx.Node) -> Axis:
    """Out element [.., i, ..] is the table's element at index[.., i, ..], on every other axis at
    its own place: those axes must not number token rows."""
    table, index = argument(node, "self"), argument(node, "index")
    if rows.of(table) is not None:
        raise mixed(node, "looks values up in a table made of token rows")
    axis = rows.of(index)
    dim = int(argument(node, "dim")) % rank(node)
    refuse_along(rows, node, table, [dim], "looks values up along")
    if axis not in (None, dim):
        raise mixed(node, "numbers token rows by their place in the sequence")
    return axis


def _convolution(rows: Rows, node: fx.Node) -> Axis:
    axis = rows.of(node.args[0])
    if axis is not None and axis >= 2:
        raise mixed(node, "slides over the token axis, so a row depends on its neighbours")
    raise mixed(node, "convolves token rows in a way that is not analysed")


def _attention(rows: Rows, node: fx.Node) -> Axis:
    if all(rows.is_constant(operand) for operand in node.all_input_nodes):
        return None
    q, k, v = (argument(node, name) for name in ("q_BHSD", "k_BGTD", "v_BGTE"))
    for operand in (q, k, v):
        heads, width = (shape_of(operand)[i] for i in (1, 3))
        if not isinstance(heads, int) or not isinstance(width, int):
            raise batch_mixed(
                node,
                "has heads whose number depends on the batch or the sequence; write it over "
                "[batch, heads, sequence, width]",
            )
    if any(sizes(operand)[0] != rows.batch for operand in (q, k, v)):
        raise batch_mixed(
            node,
            "has heads folded into its batch; write it over [batch, heads, sequence, width]",
        )
    if not {rows.of(q), rows.of(k), rows.of(v)} == {2}:
        raise mixed(node, "attends from token rows to something else (cross-attention)")
    if not argument(node, "causal"):
        raise mixed(node, "is bidirectional: later tokens change earlier ones")
    if argument(node, "mask") is not None:
        raise mixed(node, "has a dense mask whose meaning is not proven")
    for name in ("predicate", "bias"):
        if argument(node, name):
            raise mixed(node, f"has a {name} that the paged cache has no kernel for")
    padding = argument(node, "pad_BT")
    if padding is not None and padding not in rows.padding and not _is_all_true(padding):
        raise mixed(
            node,
            "has a padding mask that is not an input of its own: a step has no padding, and "
            "dropping this mask would change the result",
        )
    if peak_bounds(node) is None:
        raise mixed(node, "hides keys by numbers that have no bound, so later tokens may be seen")
    if not rows.is_constant(argument(node, "sinks_H")):
        raise mixed(node, "has sinks that depend on the tokens")
    return 2


_NO_WEIGHT = 104.0
"""exp of less than minus this is zero in float32."""


def peak_bounds(node: fx.Node) -> tuple[float, float] | None:
    """Between which the highest score of a row of causal attention must lie for hidden keys to
    weigh nothing; (0, 0) where they never do, None where it cannot be told.

    A number that is filled in must lie below the highest score. Where one is added, the hidden
    scores are not known; they are taken to be no higher than all of the others may be.
    """
    hidden, softcap = str(argument(node, "hidden")), float(argument(node, "softcap"))
    found = (-math.inf, False) if not hidden else predicate.highest(hidden, "s")
    if found is None:
        return None
    low, is_added = found
    if low <= NEGLIGIBLE or (softcap and low < -2 * softcap - _NO_WEIGHT):
        return 0.0, 0.0
    if is_added:
        return (low + _NO_WEIGHT) / 2, -(low + _NO_WEIGHT) / 2
    return low + _NO_WEIGHT, -NEGLIGIBLE


def _is_all_true(mask: fx.Node) -> bool:
    """A mask of ones, which some models make when they are given none."""
    while is_call(mask, *CASTS, aten.expand.default):
        (mask,) = (n for n in mask.all_input_nodes if n is mask.args[0])
    if is_call(mask, aten.full.default):
        return bool(argument(mask, "fill_value") == 1)
    return is_call(mask, aten.ones.default)


def _rope(rows: Rows, node: fx.Node) -> Axis:
    axis = rows.of(node.args[0])
    for table in node.args[1:3]:
        if rows.of(table) not in (None, 1):
            raise mixed(node, "has angle tables with tokens on another axis")
    if axis not in (None, 2):
        raise mixed(node, "has its tokens on another axis")
    return axis


RULES: dict[object, Rule] = {
    **SHAPE_RULES,
    aten.linear.default: _linear,
    linear_wq.SPEC.overload: _linear,
    aten.addmm.default: _addmm,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.matmul.default: _matmul,
    aten.embedding.default: _embedding,
    embedding_wq.SPEC.overload: _embedding,
    aten.gather.default: _gather,
    aten.layer_norm.default: _last_axes,
    aten.native_layer_norm.default: _last_axes,
    layer_norm.SPEC.overload: _last_axes,
    rms_norm.SPEC.overload: _last_axes,
    **dict.fromkeys(CASTS, pointwise),
    aten.to.other: pointwise,
    aten.dropout.default: pointwise,
    attention.SPEC.overload: _attention,
    rope.SPEC.overload: _rope,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.convolution.default: _convolution,
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
