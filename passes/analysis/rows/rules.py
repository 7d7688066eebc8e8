"""Which axis of each value enumerates token rows, and which ops keep rows apart.

`trace_rows.py` gives every node
    an axis number   the value holds one slice per token row along that axis
    None             the value does not depend on the tokens
A rule raises `RowsMixedError` when its op lets one row see another, or one batch item another.
Attention is the only op that may, and only when it is causal over the same rows. Batch items are
independent requests. `layout.py` holds the terms, `shape_rules.py` the ops that move axes,
`row_product_rules.py` those that multiply, `row_index_rules.py` those that look values up; an op
without a rule is taken apart by `parts.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import fx

from graphopt.ir.graph import argument, is_call, shape_of, tensor_inputs
from graphopt.ir.opset import is_impure
from graphopt.ops import attention, layer_norm, predicate, rms_norm, rope
from graphopt.ops.attention import NEGLIGIBLE
from graphopt.passes.analysis.rows.index_rules import INDEX_RULES
from graphopt.passes.analysis.rows.layout import (
    Axis,
    Rows,
    Rule,
    batch_mixed,
    mixed,
    rank,
    refuse_along,
    row_axis,
    sizes,
    unknown,
)
from graphopt.passes.analysis.rows.product_rules import PRODUCT_RULES, refuse_as_weight
from graphopt.passes.analysis.rows.shape_rules import SHAPE_RULES

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
    return row_axis(rows, node)


def _along_dim(rows: Rows, node: fx.Node) -> Axis:
    """Ops that work along the axes that their `dim` names, and treat the others one by one: sums,
    softmax, sort, roll, norms. Without a `dim` they work along all."""
    operand = node.args[0]
    others = [n for n in node.all_input_nodes if n is not operand]
    if not all(rows.is_constant(other) for other in others):
        raise unknown(node, "works along an axis with other values that depend on the tokens")
    if rows.is_constant(operand):
        return None
    names = {spec.name for spec in node.target._schema.arguments}  # type: ignore[union-attr]
    name = next((name for name in ("dim", "dims", "dimension") if name in names), None)
    dims = None if name is None else argument(node, name)
    if dims is None or dims == []:
        raise mixed(node, "works along all axes, the token axis among them")
    listed = dims if isinstance(dims, (list, tuple)) else [dims]
    refuse_along(rows, node, operand, listed, "works along")
    return row_axis(rows, node)


def _same_axis(rows: Rows, node: fx.Node) -> Axis:
    """The shape of the first operand, element by element; other operands give a dtype or a size."""
    return rows.of(node.args[0])


def _view_as_complex(rows: Rows, node: fx.Node) -> Axis:
    refuse_along(rows, node, node.args[0], [-1], "pairs the values of")
    return row_axis(rows, node)


def _random_when_training(rows: Rows, node: fx.Node) -> Axis:
    name = "training" if node.target is aten.rrelu.default else "train"
    if argument(node, name) and (name == "training" or argument(node, "p") != 0):
        raise unknown(node, "draws random numbers; call eval() on the model")
    return rows.of(node.args[0])


def _prelu(rows: Rows, node: fx.Node) -> Axis:
    operand, weight = node.args[:2]
    refuse_as_weight(rows, node, [weight])
    return rows.of(operand)


def _group_norm(rows: Rows, node: fx.Node) -> Axis:
    """Over the channels of a group and all axes that follow."""
    operand = node.args[0]
    refuse_as_weight(rows, node, [n for n in node.all_input_nodes if n is not operand])
    refuse_along(rows, node, operand, range(1, rank(operand)), "normalises over")
    return rows.of(operand)


def _batch_norm(rows: Rows, node: fx.Node) -> Axis:
    """With running statistics: a scale and a shift for each channel."""
    operand = node.args[0]
    if argument(node, "training") or argument(node, "running_mean") is None:
        refuse_along(rows, node, operand, range(rank(operand)), "normalises over")
    refuse_as_weight(rows, node, [n for n in node.all_input_nodes if n is not operand])
    return rows.of(operand)


def _last_axes(rows: Rows, node: fx.Node) -> Axis:
    """Norms over trailing axes."""
    operand = node.args[0]
    shape = tensor_inputs(node).get("normalized_shape", [0])
    refuse_along(rows, node, operand, range(-len(shape), 0), "normalises over")
    return rows.of(operand)


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


def _overloads(*names: str) -> Iterator[torch._ops.OpOverload]:
    """The functional overloads of aten ops, those with named axes left out."""
    for name in names:
        packet = getattr(aten, name)
        for overload_name in packet.overloads():
            # Asked for by __getattr__ itself, torch would make a second object of the same op.
            overload = getattr(packet, overload_name)
            schema = overload._schema
            if not is_impure(overload) and "Dimname" not in str(schema):
                yield overload


# They work along the axes that `dim` names; see `_along_dim`.
_ALONG_DIM = (
    *("all", "any", "argmax", "argmin", "amax", "amin", "aminmax", "count_nonzero", "logsumexp"),
    *("mean", "median", "nanmean", "nanmedian", "nansum", "norm", "linalg_vector_norm", "prod"),
    *("std", "std_mean", "sum", "var", "var_mean", "mode", "kthvalue", "topk", "sort", "argsort"),
    *("cummax", "cummin", "cumprod", "cumsum", "logcumsumexp", "softmax", "_softmax", "flip"),
    *("log_softmax", "_log_softmax", "special_softmax", "special_log_softmax", "roll", "glu"),
)
# The first operand's shape, element by element. torch marks most of such ops as pointwise itself.
_SAME_SHAPE = (
    *("zeros_like", "ones_like", "full_like", "empty_like", "type_as", "contiguous", "alias"),
    *("detach", "lift_fresh_copy", "conj", "_conj", "resolve_conj", "resolve_neg", "real", "imag"),
    *("view_as_real", "one_hot", "pin_memory", "fill"),
)

RULES: dict[object, Rule] = {
    **SHAPE_RULES,
    **PRODUCT_RULES,
    **INDEX_RULES,
    **dict.fromkeys(_overloads(*_ALONG_DIM), _along_dim),
    aten.max.dim: _along_dim,
    aten.max.default: _along_dim,
    aten.min.dim: _along_dim,
    aten.min.default: _along_dim,
    aten.unfold.default: _along_dim,
    **dict.fromkeys(_overloads(*_SAME_SHAPE), _same_axis),
    **dict.fromkeys(CASTS, _same_axis),
    aten.to.other: _same_axis,
    aten.view_as_complex.default: _view_as_complex,
    aten.copy.default: pointwise,
    aten.polar.default: pointwise,
    aten.complex.default: pointwise,
    aten.dropout.default: _random_when_training,
    aten.feature_dropout.default: _random_when_training,
    aten.alpha_dropout.default: _random_when_training,
    aten.feature_alpha_dropout.default: _random_when_training,
    aten.rrelu.default: _random_when_training,
    aten.prelu.default: _prelu,
    aten.layer_norm.default: _last_axes,
    aten.native_layer_norm.default: _last_axes,
    aten.rms_norm.default: _last_axes,
    layer_norm.SPEC.overload: _last_axes,
    rms_norm.SPEC.overload: _last_axes,
    aten.group_norm.default: _group_norm,
    aten.batch_norm.default: _batch_norm,
    attention.SPEC.overload: _attention,
    rope.SPEC.overload: _rope,
}
