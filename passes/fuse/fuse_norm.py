"""fuse_norm: root-mean-square norms become one op.

    before   s = x.to(f32); n = s * rsqrt(mean(s^2, -1) + eps)
             y = w * n.to(dtype)                 (Llama)     or   (n * (1 + w)).to(dtype)  (Gemma)
    after    y = graphopt.rms_norm(x, w, eps=..., weight_offset=..., cast_first=...)

Anchored on rsqrt. The mean must run over the last axis only, with its axis kept; a weight must be
one-dimensional. Never touches norms that subtract the mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from graphopt.ir.builder import GraphBuilder, replace
from graphopt.ir.graph import Graph, argument, dtype_of, is_call, op_name
from graphopt.ops import rms_norm
from graphopt.passes.base import Pass, Reject, Stage, Tier
from graphopt.passes.registry import register

aten = torch.ops.aten
_CASTS = (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.type_as.default)


@dataclass(frozen=True, slots=True)
class Norm:
    """`last` computes rms_norm(x, weight)."""

    last: fx.Node
    x: fx.Node
    weight: fx.Node | None
    eps: float
    weight_offset: float
    cast_first: bool


@register
class FuseNorm(Pass[Norm]):
    """See the module docstring."""

    name: ClassVar[str] = "fuse_norm"
    stage: ClassVar[Stage] = "fuse"
    tier: ClassVar[Tier] = Tier("reassociating", 1e-6)

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        """Every rsqrt."""
        return graph.calls(aten.rsqrt.default)

    def check(self, graph: Graph, node: fx.Node) -> Norm | Reject:
        """Walk up to x, then down to the last multiplication or cast."""
        found = _mean_square(node)
        if isinstance(found, Reject):
            return found
        wide, eps = found
        products = [u for u in node.users if is_call(u, aten.mul.Tensor) and wide in u.args]
        if len(products) != 1 or len(node.users) != 1:
            return Reject("rsqrt-used-elsewhere", "the factor is not only used to scale x", node)
        x = uncast(wide) if dtype_of(wide) == torch.float32 else wide
        return _weighted(products[0], x, eps)

    def rewrite(self, builder: GraphBuilder, bound: Norm) -> None:
        """Emit the norm where its last node stood."""
        with builder.at(bound.last):
            new = builder.emit(
                rms_norm.SPEC.overload,
                [bound.x, bound.weight],
                {
                    "eps": bound.eps,
                    "weight_offset": bound.weight_offset,
                    "cast_first": bound.cast_first,
                },
                like=[bound.last, bound.x],
            )
        new.meta["layer"] = bound.last.meta["layer"]
        replace(builder.graph, bound.last, new)


def uncast(node: fx.Node) -> fx.Node:
    """The operand of a cast, or the node itself."""
    operand = node.args[0] if is_call(node, *_CASTS) else node
    assert isinstance(operand, fx.Node)
    return operand


def _mean_square(node: fx.Node) -> tuple[fx.Node, float] | Reject:
    """(x in float32, eps) of rsqrt(mean(x^2, -1, keepdim) + eps)."""
    add = node.args[0]
    if not is_call(add, aten.add.Tensor, aten.add.Scalar) or not isinstance(add, fx.Node):
        return Reject("no-epsilon", "expected an added epsilon under rsqrt", node)
    mean, eps = add.args[:2]
    if not isinstance(eps, float) or not is_call(mean, aten.mean.dim):
        return Reject("no-mean", f"expected mean + eps, found {add.args}", add)
    assert isinstance(mean, fx.Node)
    square = mean.args[0]
    assert isinstance(square, fx.Node)
    rank = len(square.meta["val"].shape)
    if [d % rank for d in argument(mean, "dim")] != [rank - 1] or not argument(mean, "keepdim"):
        return Reject("mean-axis", "the mean is not over the last axis with it kept", mean)
    if (
        (is_call(square, aten.pow.Tensor_Scalar) and square.args[1] == 2)
        or (is_call(square, aten.mul.Tensor) and square.args[0] is square.args[1])
        or is_call(square, aten.square.default)
    ):
        x = square.args[0]
    else:
        return Reject("no-square", f"expected a square, found {op_name(square)}", square)
    assert isinstance(x, fx.Node)
    return x, eps


def _weighted(product: fx.Node, x: fx.Node, eps: float) -> Norm | Reject:
    """Follow the normalised value to its weight, in either cast order."""
    target_dtype = dtype_of(x)
    node, was_cast = product, False
    user = _only_user(node)
    if user is not None and is_call(user, *_CASTS) and dtype_of(user) == target_dtype:
        node, was_cast = user, True
        user = _only_user(node)
    if user is not None and is_call(user, aten.mul.Tensor):
        other = user.args[1] if user.args[0] is node else user.args[0]
        weight, offset = _weight(other)
        if weight is not None:
            if was_cast or dtype_of(product) == target_dtype:
                if dtype_of(user) == target_dtype:
                    return Norm(user, x, weight, eps, offset, cast_first=True)
            else:
                cast = _only_user(user)
                if cast is not None and is_call(cast, *_CASTS) and dtype_of(cast) == target_dtype:
                    return Norm(cast, x, weight, eps, offset, cast_first=False)
                return Reject("no-cast-back", "the product is not cast back to x's dtype", user)
    if dtype_of(node) != target_dtype:
        return Reject("no-cast-back", "the normalised value is not cast back to x's dtype", node)
    return Norm(node, x, None, eps, 0.0, cast_first=True)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _weight(node: object) -> tuple[fx.Node | None, float]:
    """(one-dimensional weight, number added to it)."""
    if not isinstance(node, fx.Node):
        return None, 0.0
    offset = 0.0
    if is_call(node, aten.add.Tensor, aten.add.Scalar) and isinstance(node.args[1], (int, float)):
        offset = float(node.args[1])
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    node = uncast(node)
    value = node.meta["val"]
    is_weight = node.op == "get_attr" and isinstance(value, Tensor) and len(value.shape) == 1
    return (node, offset) if is_weight else (None, 0.0)
