"""A small serving graph for every lowering rule, and for the corners of some."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from serving_graph import VOCABULARY, WIDTH, ServingGraph
from torch import fx

from graphopt.ops import (
    embedding_wq,
    geglu,
    kv_write,
    layer_norm,
    linear_wq,
    paged_attention,
    rms_norm,
    rope,
    swiglu,
)

aten = torch.ops.aten

Build = Callable[[ServingGraph], fx.Node]


def _unary(op: Any) -> Build:
    return lambda c: c.emit(op, c.x())


def _of_positive(op: Any) -> Build:
    return lambda c: c.emit(op, c.positive())


def _flat(c: ServingGraph, node: fx.Node) -> fx.Node:
    return c.emit(aten.reshape.default, node, [1, c.rows(), -1])


def _packed(c: ServingGraph, rows: int, bits: int, has_zero: bool) -> list[Any]:
    name = f"packed{len(c.graph.weights)}"
    codes = (
        torch.randint(0, 256, (rows, 32), dtype=torch.uint8)
        if bits == 4
        else torch.randint(-128, 128, (rows, 64), dtype=torch.int8)
    )
    scale = (torch.rand(rows, 2) * 0.02 + 0.001).half()
    parts: list[Any] = [c.weight(codes, f"{name}.codes"), c.weight(scale, f"{name}.scale")]
    zero = c.weight((torch.randn(rows, 2) * 0.1).half(), f"{name}.zero") if has_zero else None
    return [*parts, zero]


def _linear_low_bit(bits: int, has_zero: bool, activation: str) -> Build:
    def build(c: ServingGraph) -> fx.Node:
        x, weight = c.x(64), _packed(c, 30, bits, has_zero)
        bias = c.weight(torch.randn(30))
        settings: dict[str, Any] = {"bits": bits, "group": 32, "offset": 8 if bits == 4 else 0}
        return c.emit(linear_wq.SPEC.overload, x, *weight, bias, **settings, activation=activation)

    return build


def _embedding_low_bit(bits: int) -> Build:
    def build(c: ServingGraph) -> fx.Node:
        weight = _packed(c, VOCABULARY, bits, True)
        settings: dict[str, Any] = {"bits": bits, "group": 32, "offset": 0}
        op = embedding_wq.SPEC.overload
        return c.emit(op, c.ids(), *weight, **settings, dtype=torch.float32)

    return build


def _angles(c: ServingGraph, width: int) -> list[fx.Node]:
    positions = c.emit(aten.unsqueeze.default, c.inputs["positions"], 0)
    column = c.emit(aten.unsqueeze.default, positions, 2)
    angle = c.emit(aten.to.dtype, column, torch.float32)
    wide = c.emit(aten.mul.Tensor, angle, c.weight(torch.rand(width)))
    return [c.emit(aten.cos.default, wide), c.emit(aten.sin.default, wide)]


def _rope(interleaved: bool, halved: bool, columns: int = 12) -> Build:
    def build(c: ServingGraph) -> fx.Node:
        x = c.split_heads()
        tables = _angles(c, columns // 2 if halved else columns)
        settings = {"interleaved": interleaved, "half_tables": halved}
        return c.merge_heads(c.emit(rope.SPEC.overload, x, *tables, **settings))

    return build


def _attention(window: int = 0, softcap: float = 0.0, sinks: bool = False) -> Build:
    def build(c: ServingGraph) -> fx.Node:
        k, v, q = c.split_heads(2, 16), c.split_heads(2, 16), c.split_heads(4, 16)
        caches = [c.inputs["k_cache_0"], c.inputs["v_cache_0"]]
        c.emit(kv_write.SPEC.overload, *caches, k, v, c.inputs["slots"])
        step = [c.inputs[name] for name in ("block_tables", "query_start", "kv_lens")]
        extra = [c.weight(torch.randn(4))] if sinks else []
        settings: dict[str, Any] = {"scale": 0.25, "window": window, "softcap": softcap}
        op = paged_attention.SPEC.overload
        return c.merge_heads(c.emit(op, q, *caches, *step, *extra, **settings))

    return build


def _product(op: Any, rank: int) -> Build:
    """A column by a row."""

    def build(c: ServingGraph) -> fx.Node:
        column, row = c.x(1), c.weight(torch.randn(*[1] * (rank - 1), 7))
        if rank == 2:
            column = c.emit(aten.squeeze.dim, column, 0)
        out = c.emit(op, column, row)
        return out if rank == 3 else c.emit(aten.unsqueeze.default, out, 0)

    return build


def _parts(op: Any, *args: Any, axis: int = -1, count: int = 3) -> Build:
    """Parts of an axis, weighed by their number, side by side again."""

    def build(c: ServingGraph) -> fx.Node:
        x = c.emit(aten.unflatten.int, c.x(), -1, [4, 12]) if axis == 2 else c.x()
        whole = c.emit(op, x, *args, axis)
        pieces = [
            c.emit(aten.mul.Scalar, c.emit(operator.getitem, whole, i), 1.0 + i)
            for i in range(count)
        ]
        joined = c.emit(aten.cat.default, pieces, -1)
        return _flat(c, joined)

    return build


def _cast(op: Any, *args: Any, source: torch.dtype = torch.float32, **kwargs: Any) -> Build:
    """There and back."""

    def build(c: ServingGraph) -> fx.Node:
        return c.emit(aten.to.dtype, c.emit(op, c.x(dtype=source), *args, **kwargs), torch.float32)

    return build


def _of_positions(c: ServingGraph) -> fx.Node:
    """Integers become floats."""
    positions = c.emit(aten.unsqueeze.default, c.inputs["positions"], 0)
    column = c.emit(aten.unsqueeze.default, positions, 2)
    return c.emit(aten.mul.Scalar, c.emit(aten.to.dtype, column, torch.float32), 0.5)


def _norm(op: Any, parts: int, **settings: Any) -> Build:
    def build(c: ServingGraph) -> fx.Node:
        return c.emit(op, c.x(), *[c.weight(torch.rand(WIDTH)) for _ in range(parts)], **settings)

    return build


def _plain_layer_norm(c: ServingGraph) -> fx.Node:
    weight, bias = c.weight(torch.rand(WIDTH)), c.weight(torch.randn(WIDTH))
    return c.emit(aten.layer_norm.default, c.x(), [WIDTH], weight, bias, 1e-5)


def _linear(c: ServingGraph) -> fx.Node:
    weight, bias = c.weight(torch.randn(7, WIDTH)), c.weight(torch.randn(7))
    return c.emit(aten.linear.default, c.x(), weight, bias)


def _linear_of_heads(c: ServingGraph) -> fx.Node:
    """Its rows lie apart in memory: a dense copy comes first."""
    x = c.merge_heads(c.split_heads())
    turned = c.emit(aten.transpose.int, c.emit(aten.unflatten.int, x, -1, [4, 12]), 2, 3)
    return c.emit(aten.linear.default, _flat(c, turned), c.weight(torch.randn(5, WIDTH)))


def _gated(op: Any, **settings: Any) -> Build:
    return lambda c: c.emit(op, c.x(), c.x(), **settings)


def _gelu(approximate: str) -> Build:
    return lambda c: c.emit(aten.gelu.default, c.x(), approximate=approximate)


def _binary(op: Any) -> list[Build]:
    def weight(c: ServingGraph) -> fx.Node:
        return c.emit(op, c.positive(), c.weight(torch.rand(WIDTH) + 0.5))

    def weight_first(c: ServingGraph) -> fx.Node:
        return c.emit(op, c.weight(torch.rand(1, 1, WIDTH) + 0.5), c.positive())

    def half(c: ServingGraph) -> fx.Node:
        """float32 with bfloat16 is float32."""
        return c.emit(op, c.positive(), c.emit(aten.to.dtype, c.positive(), torch.bfloat16))

    return [lambda c: c.emit(op, c.positive(), c.positive()), weight, weight_first, half]


def _scalar(op: Any) -> list[Build]:
    return [lambda c: c.emit(op, c.x(), 0.7), lambda c: c.emit(op, c.x(), 3)]


def _slice(*bounds: Any) -> Build:
    return lambda c: c.emit(aten.slice.Tensor, c.x(), -1, *bounds)


def _slice_of_rows(c: ServingGraph) -> fx.Node:
    return c.emit(aten.slice.Tensor, c.x(), 1)


def _cat(axis: int) -> Build:
    def build(c: ServingGraph) -> fx.Node:
        parts = [c.emit(aten.unflatten.int, c.x(), -1, [4, 12]) for _ in range(2)]
        return _flat(c, c.emit(aten.cat.default, [*parts, parts[0]], axis))

    return build


def _select(index: int) -> Build:
    def build(c: ServingGraph) -> fx.Node:
        return c.emit(aten.select.int, c.emit(aten.unflatten.int, c.x(), -1, [4, 12]), 2, index)

    return build


def _repeat(axis: int) -> Build:
    def build(c: ServingGraph) -> fx.Node:
        heads = c.emit(aten.unflatten.int, c.x(), -1, [4, 12])
        return _flat(c, c.emit(aten.repeat_interleave.self_int, heads, 3, axis))

    return build


def _transposed(c: ServingGraph) -> fx.Node:
    turned = c.emit(aten.t.default, c.emit(aten.squeeze.dim, c.x(), 0))
    doubled = c.emit(aten.mul.Scalar, turned, 2.0)
    return c.emit(aten.unsqueeze.default, c.emit(aten.t.default, doubled), 0)


def _permuted(c: ServingGraph) -> fx.Node:
    heads = c.emit(aten.unflatten.int, c.x(), -1, [4, 12])
    return _flat(c, c.emit(aten.permute.default, heads, [0, 1, -1, 2]))


def _expanded(c: ServingGraph) -> fx.Node:
    wide = c.emit(aten.expand.default, c.x(1), [1, c.rows(), 6])
    return c.emit(aten.add.Tensor, wide, c.x(6))


def _squeezed(*axes: int) -> Build:
    def build(c: ServingGraph) -> fx.Node:
        wide = c.emit(aten.unsqueeze.default, c.x(), 2)
        op = aten.squeeze.dims if len(axes) > 1 else aten.squeeze.dim
        # An axis that is not 1 stays.
        return c.emit(op, wide, list(axes) if len(axes) > 1 else axes[0])

    return build


def _reshaped(op: Any, *shape: Any) -> Build:
    def build(c: ServingGraph) -> fx.Node:
        sizes = [c.rows() if size == "rows" else size for size in shape]
        turned = c.emit(aten.transpose.int, c.emit(op, c.x(), [1, *sizes]), 2, 3)
        return _flat(c, c.emit(aten.mul.Scalar, turned, 2.0))

    return build


def _flattened(c: ServingGraph) -> fx.Node:
    heads = c.emit(aten.unflatten.int, c.x(), -1, [4, 12])
    turned = c.emit(aten.transpose.int, heads, 2, 3)
    return c.emit(aten.flatten.using_ints, turned, 2, 3)


def _chosen_rows(c: ServingGraph) -> fx.Node:
    """Rows picked before the last ones are: every row's own."""
    return c.emit(aten.mul.Scalar, c.x(), 2.0)


def _same(op: Any, *args: Any) -> Build:
    return lambda c: c.emit(aten.mul.Scalar, c.emit(op, c.x(), *args), 2.0)


CASES: dict[Any, list[Build]] = {
    aten.neg.default: [_unary(aten.neg.default)],
    aten.exp.default: [_unary(aten.exp.default)],
    aten.rsqrt.default: [_of_positive(aten.rsqrt.default)],
    aten.sqrt.default: [_of_positive(aten.sqrt.default)],
    aten.sigmoid.default: [_unary(aten.sigmoid.default)],
    aten.silu.default: [_unary(aten.silu.default)],
    aten.tanh.default: [_unary(aten.tanh.default)],
    aten.relu.default: [_unary(aten.relu.default)],
    aten.cos.default: [_unary(aten.cos.default)],
    aten.sin.default: [_unary(aten.sin.default)],
    aten.reciprocal.default: [_of_positive(aten.reciprocal.default)],
    aten.square.default: [_unary(aten.square.default)],
    aten.gelu.default: [_gelu("none"), _gelu("tanh")],
    aten.pow.Tensor_Scalar: [lambda c: c.emit(aten.pow.Tensor_Scalar, c.x(), 2)],
    aten.to.dtype: [_cast(aten.to.dtype, torch.bfloat16), _of_positions],
    aten._to_copy.default: [_cast(aten._to_copy.default, dtype=torch.float16)],
    aten.to.device: [
        _cast(aten.to.device, torch.device("cpu"), torch.float32, source=torch.bfloat16)
    ],
    aten.to.dtype_layout: [_cast(aten.to.dtype_layout, dtype=torch.float16)],
    aten.add.Tensor: _binary(aten.add.Tensor),
    aten.sub.Tensor: _binary(aten.sub.Tensor),
    aten.mul.Tensor: _binary(aten.mul.Tensor),
    aten.div.Tensor: _binary(aten.div.Tensor),
    aten.maximum.default: _binary(aten.maximum.default),
    aten.minimum.default: _binary(aten.minimum.default),
    aten.add.Scalar: _scalar(aten.add.Scalar),
    aten.sub.Scalar: _scalar(aten.sub.Scalar),
    aten.mul.Scalar: _scalar(aten.mul.Scalar),
    aten.div.Scalar: _scalar(aten.div.Scalar),
    aten.matmul.default: [_product(aten.matmul.default, 3), _product(aten.matmul.default, 2)],
    aten.bmm.default: [_product(aten.bmm.default, 3)],
    aten.mm.default: [_product(aten.mm.default, 2)],
    aten.embedding.default: [lambda c: c.x(5), lambda c: c.x(16, torch.float32)],
    embedding_wq.SPEC.overload: [_embedding_low_bit(4), _embedding_low_bit(8)],
    aten.linear.default: [_linear, _linear_of_heads],
    linear_wq.SPEC.overload: [
        _linear_low_bit(bits, has_zero, activation)
        for bits in (4, 8)
        for has_zero in (False, True)
        for activation in ("float", "int8")
    ],
    rms_norm.SPEC.overload: [
        _norm(rms_norm.SPEC.overload, 1, eps=1e-5),
        _norm(rms_norm.SPEC.overload, 0, eps=1e-5),
        _norm(rms_norm.SPEC.overload, 1, eps=1e-5, weight_offset=1.0, cast_first=False),
    ],
    aten.layer_norm.default: [_plain_layer_norm],
    layer_norm.SPEC.overload: [_norm(layer_norm.SPEC.overload, n, eps=1e-5) for n in (0, 1, 2)],
    rope.SPEC.overload: [
        _rope(interleaved, halved, columns)
        for interleaved in (False, True)
        for halved in (False, True)
        for columns in (12, 8)
    ],
    kv_write.SPEC.overload: [_attention()],
    paged_attention.SPEC.overload: [
        _attention(window=3),
        _attention(softcap=5.0),
        _attention(sinks=True),
    ],
    swiglu.SPEC.overload: [_gated(swiglu.SPEC.overload)],
    geglu.SPEC.overload: [_gated(geglu.SPEC.overload, approximate=how) for how in ("none", "tanh")],
    aten.unsqueeze.default: [_squeezed(2)],
    aten.squeeze.dim: [_squeezed(2), _squeezed(-2)],
    aten.squeeze.dims: [_squeezed(2, 3), _squeezed(-2, -1)],
    aten.reshape.default: [
        _reshaped(aten.reshape.default, "rows", 4, 12),
        _reshaped(aten.reshape.default, "rows", -1, 3),
    ],
    aten.view.default: [_reshaped(aten.view.default, "rows", 4, 12)],
    aten.flatten.using_ints: [_flattened],
    aten.unflatten.int: [_flattened],
    aten._unsafe_view.default: [_reshaped(aten._unsafe_view.default, "rows", 4, 12)],
    aten.transpose.int: [_linear_of_heads],
    aten.t.default: [_transposed],
    aten.permute.default: [_permuted],
    aten.expand.default: [_expanded],
    aten.contiguous.default: [_same(aten.contiguous.default)],
    aten.alias.default: [_same(aten.alias.default)],
    aten.detach.default: [_same(aten.detach.default)],
    aten.clone.default: [_same(aten.clone.default)],
    aten.slice.Tensor: [
        _slice(3, 40),
        _slice(-7),
        _slice(0, -5),
        _slice(1, 46, 5),
        _slice(-100, 20),
        _slice(-100, -40, 3),
        _slice(40, 1000),
        _slice_of_rows,
    ],
    aten.select.int: [_select(0), _select(3), _select(-2)],
    aten.cat.default: [_cat(-1), _cat(2)],
    aten.repeat_interleave.self_int: [_repeat(2), _repeat(-1)],
    aten.chunk.default: [
        _parts(aten.chunk.default, 3),
        _parts(aten.chunk.default, 3, axis=2, count=2),
    ],
    aten.split.Tensor: [_parts(aten.split.Tensor, 16), _parts(aten.split.Tensor, 20)],
    aten.split_with_sizes.default: [_parts(aten.split_with_sizes.default, [8, 30, 10])],
    aten.unbind.int: [_parts(aten.unbind.int, axis=2, count=4)],
    operator.getitem: [_parts(aten.split.Tensor, 16)],
    aten.index_select.default: [_chosen_rows],
}
"""A rule that is left out here fails a test."""
