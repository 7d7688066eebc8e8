"""canonicalize_views: one spelling for each change of shape.

    view, _unsafe_view, flatten, unflatten       -> aten.reshape(x, [sizes])
    view_as, reshape_as                          -> aten.reshape(x, [sizes of the other])
    transpose/unsqueeze/cat/slice/... with dim<0 -> the same with dim >= 0
    permute that swaps two axes, mT, t           -> aten.transpose

Memory layout is no part of this IR's meaning, so reshape stands for view. Exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphopt.ir.builder import GraphBuilder, replace
from graphopt.ir.graph import Graph, argument, is_call
from graphopt.passes.base import Pass, Reject, Stage
from graphopt.passes.registry import register

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten._unsafe_view.default)
# Position of the dim argument, and what to add to the rank for counting from the end.
_DIMS: dict[object, tuple[tuple[int, ...], int]] = {
    aten.transpose.int: ((1, 2), 0),
    aten.unsqueeze.default: ((1,), 1),
    aten.slice.Tensor: ((1,), 0),
    aten.select.int: ((1,), 0),
    aten.softmax.int: ((1,), 0),
}
_MATRIX_TRANSPOSES = (aten.mT.default, aten.t.default)


@dataclass(frozen=True, slots=True)
class Respelled:
    """The same call in the canonical spelling. like: None, or the node whose sizes the result
    has, where the call names it instead of sizes."""

    node: fx.Node
    target: Any
    args: tuple[Any, ...]
    like: fx.Node | None = None


@register
class CanonicalizeViews(Pass[Respelled]):
    """See the module docstring."""

    name: ClassVar[str] = "canonicalize_views"
    stage: ClassVar[Stage] = "cleanup"

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        """Shape ops that are not in canonical form."""
        return [node for node in graph.nodes if _canonical(node) is not None]

    def check(self, graph: Graph, node: fx.Node) -> Respelled | Reject:
        """The canonical spelling."""
        spelled = _canonical(node)
        if spelled is None:
            return Reject("already-canonical", "an operand changed since it was matched", node)
        return spelled

    def rewrite(self, builder: GraphBuilder, bound: Respelled) -> None:
        """Emit it."""
        args, kwargs = bound.args, dict(bound.node.kwargs)
        if bound.target is aten.reshape.default:
            kwargs = {}
        if bound.like is not None:
            args = (args[0], _sizes(builder, bound.node, bound.like))
        new = builder.emit(bound.target, args, kwargs, like=[bound.node])
        replace(builder.graph, bound.node, new)


def _canonical(node: fx.Node) -> Respelled | None:
    if is_call(node, *_VIEWS):
        return Respelled(node, aten.reshape.default, (node.args[0], argument(node, "size")))
    if is_call(node, aten.view_as.default, aten.reshape_as.default):
        sizes = _plain_sizes(node.meta["val"])
        like = argument(node, "other") if sizes is None else None
        return Respelled(node, aten.reshape.default, (node.args[0], sizes), like)
    if is_call(node, aten.flatten.using_ints, aten.unflatten.int):
        sizes = _plain_sizes(node.meta["val"])
        return (
            None if sizes is None else Respelled(node, aten.reshape.default, (node.args[0], sizes))
        )
    if is_call(node, aten.permute.default):
        return _as_transpose(node)
    if is_call(node, *_MATRIX_TRANSPOSES):
        rank = len(node.meta["val"].shape)
        swapped = (node.args[0], rank - 2, rank - 1)
        return Respelled(node, aten.transpose.int, swapped) if rank >= 2 else None
    if node.op == "call_function" and node.target in _DIMS:
        places, extra = _DIMS[node.target]
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        rank = len(operand.meta["val"].shape) + extra
        args = list(node.args)
        for place in places:
            if place < len(args) and isinstance(args[place], int) and args[place] < 0:  # type: ignore[operator]
                args[place] = args[place] + rank  # type: ignore[operator]
        return None if args == list(node.args) else Respelled(node, node.target, tuple(args))
    return None


def _sizes(builder: GraphBuilder, node: fx.Node, like: fx.Node) -> list[Any]:
    """The sizes of `like`, the symbolic ones read from it."""
    return [
        size
        if isinstance(size, int)
        else builder.emit(aten.sym_size.int, (like, axis), like=[node])
        for axis, size in enumerate(like.meta["val"].shape)
    ]


def _plain_sizes(value: Tensor) -> list[int] | None:
    """Sizes with at most one symbolic axis, written as -1."""
    symbolic = [size for size in value.shape if not isinstance(size, int)]
    if len(symbolic) > 1:
        return None
    return [size if isinstance(size, int) else -1 for size in value.shape]


def _as_transpose(node: fx.Node) -> Respelled | None:
    dims = argument(node, "dims")
    order = [d % len(dims) for d in dims]
    moved = [i for i, d in enumerate(order) if i != d]
    if len(moved) == 2:
        return Respelled(node, aten.transpose.int, (node.args[0], moved[0], moved[1]))
    return None
