"""Lowering of the ops that compute: kernels of `native/abi.h` (weights: `rules_weights.py`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphopt.codegen.cpu.abi import BinaryKind, GluKind, NormCast, Op, RopeStyle, Sym, UnaryKind
from graphopt.codegen.cpu.dtypes import FLOATS
from graphopt.codegen.cpu.lower import (
    Lowering,
    Rule,
    elementwise,
    is_vector,
    scalar,
    tensor_floats,
)
from graphopt.codegen.cpu.views import Extent, View
from graphopt.errors import BackendError
from graphopt.ir.graph import argument, where
from graphopt.ops import (
    geglu,
    kv_write,
    layer_norm,
    paged_attention,
    rms_norm,
    rope,
    swiglu,
)

aten = torch.ops.aten

_UNARY: dict[object, UnaryKind] = {
    aten.neg.default: UnaryKind.UNARY_NEG,
    aten.exp.default: UnaryKind.UNARY_EXP,
    aten.rsqrt.default: UnaryKind.UNARY_RSQRT,
    aten.sqrt.default: UnaryKind.UNARY_SQRT,
    aten.sigmoid.default: UnaryKind.UNARY_SIGMOID,
    aten.silu.default: UnaryKind.UNARY_SILU,
    aten.tanh.default: UnaryKind.UNARY_TANH,
    aten.relu.default: UnaryKind.UNARY_RELU,
    aten.cos.default: UnaryKind.UNARY_COS,
    aten.sin.default: UnaryKind.UNARY_SIN,
    aten.reciprocal.default: UnaryKind.UNARY_RECIPROCAL,
    aten.square.default: UnaryKind.UNARY_SQUARE,
}
_BINARY: dict[object, BinaryKind] = {
    aten.add.Tensor: BinaryKind.BINARY_ADD,
    aten.sub.Tensor: BinaryKind.BINARY_SUB,
    aten.mul.Tensor: BinaryKind.BINARY_MUL,
    aten.div.Tensor: BinaryKind.BINARY_DIV,
    aten.maximum.default: BinaryKind.BINARY_MAX,
    aten.minimum.default: BinaryKind.BINARY_MIN,
    aten.add.Scalar: BinaryKind.BINARY_ADD,
    aten.sub.Scalar: BinaryKind.BINARY_SUB,
    aten.mul.Scalar: BinaryKind.BINARY_MUL,
    aten.div.Scalar: BinaryKind.BINARY_DIV,
}


def unary(lowering: Lowering, node: fx.Node) -> bool:
    """One operand, same shape."""
    return _unary(lowering, node, _UNARY[node.target])


def gelu(lowering: Lowering, node: fx.Node) -> bool:
    """Both spellings."""
    is_tanh = argument(node, "approximate") == "tanh"
    kind = UnaryKind.UNARY_GELU_TANH if is_tanh else UnaryKind.UNARY_GELU
    return _unary(lowering, node, kind)


def square(lowering: Lowering, node: fx.Node) -> bool:
    """Only the second power has a kernel."""
    return argument(node, "exponent") == 2 and _unary(lowering, node, UnaryKind.UNARY_SQUARE)


def cast(lowering: Lowering, node: fx.Node) -> bool:
    """Same values in another dtype; the kernel takes float to float and integer to float."""
    source = lowering.view(node.args[0])
    dtype = node.meta["val"].dtype
    if dtype == source.dtype:
        lowering.views[node] = source
        return True
    # The copy kernel rounds once, from a float or an integer to a float.
    if dtype not in FLOATS or source.dtype not in (*FLOATS, torch.int64, torch.int32):
        return False
    lowering.output(node)
    lowering.copy(source, lowering.views[node])
    return True


def _unary(lowering: Lowering, node: fx.Node, kind: UnaryKind) -> bool:
    source = lowering.view(node.args[0])
    if not tensor_floats(source) or node.meta["val"].dtype != source.dtype:
        return False
    elementwise(lowering, Op.OP_UNARY, [lowering.output(node), source], (kind,))
    return True


def binary(lowering: Lowering, node: fx.Node) -> bool:
    """Two operands with broadcasting, or one and a number."""
    left, right = node.args[:2]
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2 or not isinstance(left, fx.Node):
        return False
    return _binary(lowering, node, _BINARY[node.target], left, right)


def _binary(lowering: Lowering, node: fx.Node, kind: BinaryKind, left: Any, right: Any) -> bool:
    number = scalar(right)
    views = [lowering.view(left)]
    if number is None:
        if not isinstance(right, fx.Node) or not isinstance(right.meta["val"], Tensor):
            return False
        views.append(lowering.view(right))
    if not tensor_floats(*views) or node.meta["val"].dtype not in (v.dtype for v in views):
        return False
    # A 0-dim tensor does not take part in torch's type promotion; the kernel computes in fp32 and
    # rounds once to the result's dtype either way.
    out = lowering.output(node)
    attrs_f = () if number is None else (number,)
    elementwise(lowering, Op.OP_BINARY, [out, *views], (kind,), attrs_f)
    return True


def outer_product(lowering: Lowering, node: fx.Node) -> bool:
    """A product over a single column (RoPE angles): a broadcast multiplication."""
    left, right = node.args[:2]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    shapes = [n.meta["val"].shape for n in (left, right)]
    one = shapes[0][-1]
    if min(map(len, shapes)) < 2 or not (isinstance(one, int) and one == 1):
        return False
    return _binary(lowering, node, BinaryKind.BINARY_MUL, left, right)


def rms(lowering: Lowering, node: fx.Node) -> bool:
    """Root-mean-square norm over the last axis."""
    weight = argument(node, "weight_D")
    cast_first = bool(argument(node, "cast_first"))
    attrs_i = (NormCast.ROUND_FIRST if cast_first else NormCast.ROUND_LAST,)
    attrs_f = (float(argument(node, "eps")), float(argument(node, "weight_offset")))
    weights = [] if weight is None else [lowering.view(weight)]
    return _norm(lowering, node, Op.OP_RMS_NORM, weights, attrs_i, attrs_f)


def layer_normalised(lowering: Lowering, node: fx.Node) -> bool:
    """Layer norm over the last axis only."""
    if node.target is layer_norm.SPEC.overload:
        operands = [argument(node, "weight_D"), argument(node, "bias_D")]
    elif len(argument(node, "normalized_shape")) == 1:
        operands = [argument(node, "weight"), argument(node, "bias")]
    else:
        return False
    weights = [None if w is None else lowering.view(w) for w in operands]
    eps = float(argument(node, "eps"))
    return _norm(lowering, node, Op.OP_LAYER_NORM, weights, (), (eps,))


def _norm(
    lowering: Lowering, node: fx.Node, op: Op, weights: Any, attrs_i: Any, attrs_f: Any
) -> bool:
    source = lowering.view(node.args[0])
    out = lowering.output(node)
    shape, shape_out = lowering.rows_heads_width(source), lowering.rows_heads_width(out)
    if shape is None or shape_out is None or not tensor_floats(source, out):
        return False
    rows, heads, width, row_stride, head_stride = shape
    # The kernel reads `width` weights, one after the other.
    if not all(view is None or is_vector(view, width) for view in weights):
        return False
    steps = [[shape_out[3], shape_out[4]], [row_stride, head_stride]]
    lowering.add(op, [out, source, *weights], [rows, heads, Extent(width)], steps, attrs_i, attrs_f)
    return True


def _heads(view: View) -> tuple[Extent, Extent, int, int, int] | None:
    """`[1, H, T, D]` as (rows, heads, width, row stride, head stride)."""
    one, heads, rows, width = view.extents
    if not one.is_one or heads.sym is not Sym.SYM_ONE or view.strides[3] != 1:
        return None
    return rows, heads, width.mult, view.strides[2], view.strides[1]


def rotary(lowering: Lowering, node: fx.Node) -> bool:
    """Rotary embedding of the first columns, either pairing, tables of either width."""
    source, cos, sin = (lowering.view(n) for n in node.args[:3])
    out = lowering.output(node)
    shape, shape_out = _heads(source), _heads(out)
    if shape is None or shape_out is None or not tensor_floats(source, cos, sin, out):
        return False
    tables = (cos.extents, sin.extents)
    # The kernel reads a row of each table for each row, or one for all.
    if any(not axes[0].is_one or axes[1] not in (shape[0], Extent(1)) for axes in tables):
        return False
    if cos.strides[2] != 1 or sin.strides[2] != 1:
        cos, sin = lowering.dense(cos), lowering.dense(sin)
    interleaved, halved = argument(node, "interleaved"), argument(node, "half_tables")
    rows, heads, width, row_stride, head_stride = shape
    steps = [shape_out[3:], [row_stride, head_stride], [cos.strides[1]], [sin.strides[1]]]
    rotary_width = cos.extents[2].mult * (2 if halved else 1)
    dims = [rows, heads, Extent(width), Extent(rotary_width)]
    style = RopeStyle.INTERLEAVED if interleaved else RopeStyle.ROTATE_HALF
    lowering.add(Op.OP_ROPE, [out, source, cos, sin], dims, steps, (style, int(halved)))
    return True


def _check_cache(node: fx.Node, name: str, heads: int, width: int) -> None:
    shape = tuple(argument(node, name).meta["val"].shape[2:])
    if shape != (heads, width):
        raise BackendError(
            f"{name} of {where(node)} holds {list(shape)} per token, not {[heads, width]}"
        )


def _check_rows(node: fx.Node, *rows: Extent) -> None:
    """Cache ops go by the step's token rows: another count would read beside its operands."""
    if any(count != Extent(1, Sym.SYM_TOKENS) for count in rows):
        raise BackendError(f"{where(node)} does not work on the token rows of the step")


def write_cache(lowering: Lowering, node: fx.Node) -> bool:
    """Keys and values into the cache. Block size and blocks are filled in per cache."""
    k_cache, v_cache = (lowering.opaque(n) for n in node.args[:2])
    k, v, slots = (lowering.view(n) for n in node.args[2:])
    k_shape, v_shape = _heads(k), _heads(v)
    if k_shape is None or v_shape is None:
        k, v = lowering.dense(k), lowering.dense(v)
        k_shape, v_shape = _heads(k), _heads(v)
    if k_shape is None or v_shape is None or not tensor_floats(k, v):
        return False
    rows, heads, k_width = k_shape[:3]
    _check_rows(node, rows, v_shape[0])
    if v_shape[1] != heads:
        return False
    steps = [[], [], k_shape[3:], v_shape[3:], [1]]
    _check_cache(node, "k_cache", heads.mult, k_width)
    _check_cache(node, "v_cache", heads.mult, v_shape[2])
    dims = [rows, heads, Extent(k_width), Extent(v_shape[2])]
    lowering.add(Op.OP_KV_WRITE, [k_cache, v_cache, k, v, slots], dims, steps, writes=2)
    return True


def paged(lowering: Lowering, node: fx.Node) -> bool:
    """Attention over the paged cache."""
    names = ("k_cache", "v_cache", "block_tables", "query_start", "kv_lens")
    others = [lowering.opaque(argument(node, name)) for name in names]
    q = lowering.view(argument(node, "q_BHTD"))
    sinks = argument(node, "sinks_H")
    shape = _heads(q)
    if shape is None:
        q = lowering.dense(q)
        shape = _heads(q)
    out = lowering.output(node)
    shape_out = _heads(out)
    if shape is None or shape_out is None or not tensor_floats(q, out):
        return False
    rows, heads, width, row_stride, head_stride = shape
    _check_rows(node, rows)
    kv_heads = int(argument(node, "k_cache").meta["val"].shape[2])
    if heads.mult % kv_heads:
        return False
    _check_cache(node, "k_cache", kv_heads, width)
    _check_cache(node, "v_cache", kv_heads, shape_out[2])
    sink_views = [] if sinks is None else [lowering.view(sinks)]
    if not all(is_vector(view, heads.mult) for view in sink_views):
        return False
    operands = [out, q, *others, *sink_views]
    steps: list[Any] = [shape_out[3:], [row_stride, head_stride]]
    attrs_i = (0, heads.mult // kv_heads, int(argument(node, "window")))
    floats = ("scale", "softcap", "least_peak", "most_peak")
    attrs_f = tuple(float(argument(node, name)) for name in floats)
    dims = [rows, Extent(kv_heads), Extent(width), Extent(shape_out[2])]
    lowering.add(Op.OP_PAGED_ATTENTION, operands, dims, steps, attrs_i, attrs_f)
    return True


def gated(lowering: Lowering, node: fx.Node) -> bool:
    """Activation of the gate times up."""
    gate, up = (lowering.view(n) for n in node.args[:2])
    out = lowering.output(node)
    flat = [lowering.rows_by_width(v) for v in (out, gate, up)]
    if not out.extents == gate.extents == up.extents:
        return False
    if any(f is None for f in flat) or not tensor_floats(out, gate, up):
        return False
    if node.target is swiglu.SPEC.overload:
        kind = GluKind.GLU_SILU
    else:
        is_tanh = argument(node, "approximate") == "tanh"
        kind = GluKind.GLU_GELU_TANH if is_tanh else GluKind.GLU_GELU
    rows, _, width = flat[0] or (Extent(1), 0, 0)
    steps = [[f[1]] for f in flat if f is not None]
    lowering.add(Op.OP_GLU, [out, gate, up], [rows, Extent(width)], steps, (kind,))
    return True


RULES: dict[object, Rule] = {
    **dict.fromkeys(_UNARY, unary),
    aten.gelu.default: gelu,
    aten.pow.Tensor_Scalar: square,
    aten.to.dtype: cast,
    aten._to_copy.default: cast,
    aten.to.device: cast,
    aten.to.dtype_layout: cast,
    **dict.fromkeys(_BINARY, binary),
    aten.matmul.default: outer_product,
    aten.bmm.default: outer_product,
    aten.mm.default: outer_product,
    rms_norm.SPEC.overload: rms,
    aten.layer_norm.default: layer_normalised,
    layer_norm.SPEC.overload: layer_normalised,
    rope.SPEC.overload: rotary,
    kv_write.SPEC.overload: write_cache,
    paged_attention.SPEC.overload: paged,
    swiglu.SPEC.overload: gated,
    geglu.SPEC.overload: gated,
}
