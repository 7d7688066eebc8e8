"""fuse_norm: root-mean-square norms and layer norms become one op each.

    before   s = x.to(f32); n = s * rsqrt(mean(s^2, -1) + eps)
             y = w * n.to(dtype)                 (Llama)     or   (n * (1 + w)).to(dtype)  (Gemma)
    after    y = graphopt.rms_norm(x, w, eps=..., weight_offset=..., cast_first=...)

    before   c = s - mean(s, -1); n = c * rsqrt(mean(c^2, -1) + eps)   or with var(s, -1)
             y = (w * n + b).to(dtype)           or   aten.layer_norm(x, [D], w, b, eps)
    after    y = graphopt.layer_norm(x, w, b, eps=...)

Anchored on the root (rsqrt, sqrt, or a power of 1/2) of a mean and on the norm ops of ATen. The
mean runs over the last axis only, with its axis kept; weight and bias are one-dimensional and as
wide as that axis. How the factor is found is in `norm_factor.py`, what follows it here.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from graphopt.ir.builder import GraphBuilder
from graphopt.ir.builder import replace as replace_node
from graphopt.ir.graph import Graph, argument, dtype_of, is_call, shape_of
from graphopt.ops import layer_norm, rms_norm
from graphopt.passes.base import Pass, Reject, Stage, Tier, not_floats
from graphopt.passes.fuse.norm.factor import is_root_of_mean, read_factor
from graphopt.passes.fuse.walk import CASTS, only_user, other_operand, uncast
from graphopt.passes.registry import register

aten = torch.ops.aten
_NORMS = (aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default)
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Norm:
    """`last` computes the norm of x. centred: a layer norm. cast_first, weight_offset: of RMS."""

    last: fx.Node
    x: fx.Node
    eps: float
    centred: bool
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    weight_offset: float = 0.0
    cast_first: bool = True


@dataclass(frozen=True, slots=True)
class _Scaled:
    """product = value * (weight + offset); added_in: the dtype of that sum, None without one."""

    product: fx.Node
    weight: fx.Node
    offset: float
    added_in: torch.dtype | None


@register
class FuseNorm(Pass[Norm]):
    """See the module docstring."""

    name: ClassVar[str] = "fuse_norm"
    stage: ClassVar[Stage] = "fuse"
    tier: ClassVar[Tier] = Tier("reassociating", 1e-6)

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        """Every rsqrt, other roots of something plus a number, and ATen's own norms."""
        return [n for n in graph.nodes if is_root_of_mean(n) or is_call(n, *_NORMS)]

    def check(self, graph: Graph, node: fx.Node) -> Norm | Reject:
        """Walk up to x, then down to the last multiplication, addition or cast."""
        norm = _aten_norm(node) if is_call(node, *_NORMS) else _written_norm(node)
        if isinstance(norm, Reject):
            return norm
        return not_floats("a norm", norm.x, norm.weight, norm.bias) or norm

    def rewrite(self, builder: GraphBuilder, bound: Norm) -> None:
        """Emit the norm where its last node stood."""
        like = [bound.last, bound.x]
        attributes: dict[str, Argument] = {"eps": bound.eps}
        operands: list[Argument] = [bound.x, bound.weight]
        with builder.at(bound.last):
            if bound.centred:
                operands.append(bound.bias)
                new = builder.emit(layer_norm.SPEC.overload, operands, attributes, like=like)
            else:
                attributes["weight_offset"] = bound.weight_offset
                attributes["cast_first"] = bound.cast_first
                new = builder.emit(rms_norm.SPEC.overload, operands, attributes, like=like)
        new.meta["layer"] = bound.last.meta["layer"]
        replace_node(builder.graph, bound.last, new)


def _written_norm(node: fx.Node) -> Norm | Reject:
    factor = read_factor(node)
    if isinstance(factor, Reject):
        return factor
    follow = _after_centred if factor.centred else _after_rms
    return follow(Norm(factor.product, factor.x, factor.eps, factor.centred))


def _aten_norm(node: fx.Node) -> Norm | Reject:
    x, shape = argument(node, "input"), argument(node, "normalized_shape")
    if len(shape) != 1:
        return Reject(
            "several-axes",
            f"the norm is over the last {len(shape)} axes",
            node,
            "normalise over the last axis only",
        )
    weight, eps, last = argument(node, "weight"), argument(node, "eps"), node
    if is_call(node, aten.rms_norm.default):
        # Without one, torch takes the epsilon of the type it computes in.
        wide = torch.promote_types(dtype_of(x), torch.float32)
        eps = torch.finfo(wide).eps if eps is None else float(eps)
        return Norm(last, x, eps, False, weight, cast_first=False)
    if is_call(node, aten.native_layer_norm.default):
        item = only_user(node)
        if item is None or not is_call(item, operator.getitem) or item.args[1] != 0:
            return Reject("statistics-used", "the mean or the factor is used as well", node)
        last = item
    return Norm(last, x, float(eps), True, weight, argument(node, "bias"))


def _after_rms(norm: Norm) -> Norm:
    """Follow the normalised value to its weight, in either cast order."""
    low, last = _low(norm), norm.last
    cast = only_user(last)
    was_cast = low is not norm.x and is_call(cast, *CASTS) and _same_dtype(cast, low)
    if was_cast and cast is not None:
        last = cast
    plain = replace(norm, x=low if was_cast else norm.x, last=last)
    scaled = _weighted(last, low)
    if scaled is None:
        return plain
    fused = replace(plain, last=scaled.product, weight=scaled.weight, weight_offset=scaled.offset)
    back = only_user(scaled.product)
    if is_call(back, *CASTS) and _same_dtype(back, low) and low is not norm.x:
        assert back is not None
        fused = replace(fused, x=low, last=back)
    if not _same_dtype(fused.last, fused.x):
        return plain
    # The op adds the offset in the weight's dtype when it casts first, else in x's wide one.
    if scaled.added_in in (None, dtype_of(scaled.weight)) and (was_cast or low is norm.x):
        return replace(fused, cast_first=True)
    if scaled.added_in in (None, dtype_of(norm.x)) and not was_cast:
        return replace(fused, cast_first=False)
    return plain


def _after_centred(norm: Norm) -> Norm:
    """Follow the normalised value to its weight, its bias and the cast back."""
    low = _low(norm)
    scaled = _weighted(norm.last, low)
    if scaled is not None and not scaled.offset and _same_dtype(scaled.product, norm.last):
        norm = replace(norm, last=scaled.product, weight=scaled.weight)
    total = only_user(norm.last)
    if is_call(total, aten.add.Tensor) and total is not None and not total.kwargs:
        bias = _vector(other_operand(total, norm.last), low)
        if bias is not None and dtype_of(total) == dtype_of(norm.last):
            norm = replace(norm, last=total, bias=bias)
    back = only_user(norm.last)
    if low is not norm.x and is_call(back, *CASTS) and _same_dtype(back, low):
        assert back is not None
        return replace(norm, x=low, last=back)
    return norm


def _low(norm: Norm) -> fx.Node:
    """x before it was widened to float32; x itself when it was not."""
    low = uncast(norm.x)
    widened = dtype_of(norm.x) == torch.float32 and dtype_of(low) in _HALVES
    return low if widened else norm.x


def _same_dtype(node: fx.Node | None, other: fx.Node) -> bool:
    return node is not None and dtype_of(node) == dtype_of(other)


def _weighted(value: fx.Node, x: fx.Node) -> _Scaled | None:
    """The only use of `value`, when it is a multiplication by a weight."""
    product = only_user(value)
    if product is None or not is_call(product, aten.mul.Tensor):
        return None
    factor, offset, added_in = other_operand(product, value), 0.0, None
    if is_call(factor, aten.add.Tensor, aten.add.Scalar) and factor is not None:
        operand, number = factor.args[:2]
        if not isinstance(number, (int, float)) or factor.kwargs:
            return None
        assert isinstance(operand, fx.Node)
        offset, added_in, factor = float(number), dtype_of(factor), operand
    weight = _vector(factor, x)
    return None if weight is None else _Scaled(product, weight, offset, added_in)


def _vector(node: fx.Node | None, x: fx.Node) -> fx.Node | None:
    """A weight as wide as x's last axis, casts looked through."""
    if node is None:
        return None
    node = uncast(node)
    value = node.meta["val"]
    if node.op != "get_attr" or not isinstance(value, Tensor) or value.ndim != 1:
        return None
    width = shape_of(x)[-1]
    return node if isinstance(width, int) and int(value.shape[0]) == width else None
