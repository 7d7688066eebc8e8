"""fuse_rope: rotate-half rotary embeddings become one op.

    before   y = x * cos[:, None] + cat([-x[..., R/2:], x[..., :R/2]], -1) * sin[:, None]
    after    y = graphopt.rope(x, cos, sin)

One site a tensor: queries and keys are two. Anchored on the cat. cos and sin must be
`[S, R]`, or come from `[B or 1, S, R]` tables by an unsqueeze of the head axis.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphopt.ir.builder import GraphBuilder, replace
from graphopt.ir.graph import Graph, argument, dtype_of, is_call, shape_of
from graphopt.ops import rope
from graphopt.passes.base import Pass, Reject, Stage, Tier
from graphopt.passes.registry import register

aten = torch.ops.aten
_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


@dataclass(frozen=True, slots=True)
class Rotation:
    """`last` computes rope(x, cos, sin)."""

    last: fx.Node
    x: fx.Node
    cos: fx.Node
    sin: fx.Node


@register
class FuseRope(Pass[Rotation]):
    """See the module docstring."""

    name: ClassVar[str] = "fuse_rope"
    stage: ClassVar[Stage] = "fuse"
    tier: ClassVar[Tier] = Tier("reassociating", 1e-6)

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        """Concatenations of a negated half and another half."""
        return [n for n in graph.calls(aten.cat.default) if _is_rotation(n)]

    def check(self, graph: Graph, node: fx.Node) -> Rotation | Reject:
        """Both halves of one x, multiplied by sin, added to x * cos."""
        x = _halved(node)
        if x is None:
            return Reject("not-two-halves", "the parts are not the two halves of one tensor", node)
        if len(shape_of(x)) != 4:
            return Reject("not-heads", "expected [batch, heads, sequence, width]", node)
        products = [u for u in node.users if is_call(u, aten.mul.Tensor)]
        if len(products) != 1 or len(node.users) != 1:
            return Reject("rotation-used-elsewhere", "the rotated half has other users", node)
        (by_sin,) = products
        sums = [u for u in by_sin.users if is_call(u, aten.add.Tensor)]
        if len(sums) != 1 or len(by_sin.users) != 1 or sums[0].kwargs:
            return Reject("no-sum", "the sine term is not added to a cosine term", by_sin)
        (last,) = sums
        by_cos = next(a for a in last.args[:2] if a is not by_sin)
        if not is_call(by_cos, aten.mul.Tensor) or x not in by_cos.args:  # type: ignore[union-attr]
            return Reject("no-cosine-term", "the other term is not x * cos", last)
        cos, sin = _table(by_cos, x), _table(by_sin, node)  # type: ignore[arg-type]
        if cos is None or sin is None:
            return Reject("table-shape", "cos and sin are not [batch or 1, sequence, width]", last)
        if dtype_of(cos) != dtype_of(x) or shape_of(cos)[-1] != shape_of(x)[-1]:
            return Reject("table-dtype", "cos and sin differ from x in dtype or width", last)
        return Rotation(last, x, cos, sin)

    def rewrite(self, builder: GraphBuilder, bound: Rotation) -> None:
        """Emit the rotation where its sum stood."""
        with builder.at(bound.last):
            tables = [_with_batch(builder, table) for table in (bound.cos, bound.sin)]
            operands = [bound.x, *tables]
            new = builder.emit(rope.SPEC.overload, operands, like=[bound.last, bound.x])
        new.meta["layer"] = bound.last.meta["layer"]
        replace(builder.graph, bound.last, new)


def _is_rotation(node: fx.Node) -> bool:
    parts = argument(node, "tensors")
    return len(parts) == 2 and is_call(parts[0], aten.neg.default)


def _halved(node: fx.Node) -> fx.Node | None:
    """x of cat([-x[..., R/2:], x[..., :R/2]], -1)."""
    negated, low = argument(node, "tensors")
    high = negated.args[0]
    rank = len(shape_of(node))
    if int(argument(node, "dim")) % rank != rank - 1:
        return None
    width = shape_of(node)[-1]
    if not isinstance(width, int) or not isinstance(high, fx.Node) or not isinstance(low, fx.Node):
        return None
    upper, lower = _part(high), _part(low)
    if upper is None or lower is None or upper[0] is not lower[0]:
        return None
    x = upper[0]
    halves = (lower[1:], upper[1:]) == ((0, width // 2), (width // 2, width))
    return x if halves and shape_of(x)[-1] == width else None


def _part(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """(x, start, stop) of a range of x's last axis: a slice, or an item of chunk or split."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return None
    if is_call(node, operator.getitem):
        x, index = source.args[0], node.args[1]
        if not is_call(source, *_SPLITS) or not isinstance(x, fx.Node):
            return None
        rank = len(shape_of(x))
        if int(argument(source, "dim")) % rank != rank - 1 or not isinstance(index, int):
            return None
        widths = [int(part.shape[-1]) for part in source.meta["val"]]
        return x, sum(widths[:index]), sum(widths[: index + 1])
    rank = len(shape_of(source))
    width = shape_of(source)[-1]
    if not is_call(node, aten.slice.Tensor) or not isinstance(width, int):
        return None
    if int(argument(node, "dim")) % rank != rank - 1 or argument(node, "step") != 1:
        return None
    start, end = argument(node, "start") or 0, argument(node, "end")
    return source, start, min(width, end) if isinstance(end, int) else width


def _table(product: fx.Node, factor: fx.Node) -> fx.Node | None:
    """The [B|1, S, R] or [S, R] table that `factor` is multiplied by."""
    other = product.args[1] if product.args[0] is factor else product.args[0]
    if not isinstance(other, fx.Node):
        return None
    if len(shape_of(other)) == 2:
        return other
    if not is_call(other, aten.unsqueeze.default):
        return None
    table, axis = other.args[:2]
    return table if axis in (1, -3) and isinstance(table, fx.Node) else None


def _with_batch(builder: GraphBuilder, table: fx.Node) -> fx.Node:
    if len(shape_of(table)) == 3:
        return table
    return builder.emit(aten.unsqueeze.default, [table, 0], like=[table])
