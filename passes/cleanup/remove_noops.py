"""remove_noops: ops that return their operand.

    before   %2 = aten.to.dtype(%1, f32)   with %1 already f32
             %3 = aten.mul(%2, 1.0)
    after    users of %3 read %1

Covers casts and moves to the same dtype and device, alias, detach, clone, dropout that is off,
multiplying or dividing by 1, adding or subtracting the integer 0 to integers (x + 0.0 would turn
-0.0 into 0.0), slices of a whole axis, and expand or reshape to the same shape.

What copies stays where the copy itself matters: where an op downstream reads the memory layout that
it makes (`layout.py`), and where the caller would be handed the memory of an input, of a weight or
of another output instead of his own. Exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphopt.ir.builder import GraphBuilder
from graphopt.ir.graph import Graph, argument, is_call
from graphopt.passes.base import Pass, Reject, Stage
from graphopt.passes.cleanup.layout import keeps_layout, layout_matters, may_alias
from graphopt.passes.registry import register

aten = torch.ops.aten
_COPIES = (
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten._to_copy.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.clone.default,
    aten.contiguous.default,
)
_SHAPES = (
    aten.expand.default,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
)
_ONES = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
_ZEROS = (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)


@dataclass(frozen=True, slots=True)
class Noop:
    """A call that returns `operand`."""

    node: fx.Node
    operand: fx.Node


@register
class RemoveNoops(Pass[Noop]):
    """See the module docstring."""

    name: ClassVar[str] = "remove_noops"
    stage: ClassVar[Stage] = "cleanup"
    after: ClassVar[tuple[str, ...]] = ("canonicalize_views",)

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        """Calls that are no-ops for some operands."""
        return [node for node in graph.nodes if _operand(node) is not None]

    def check(self, graph: Graph, node: fx.Node) -> Noop | Reject:
        """Same dtype, device and shape on both sides."""
        operand = _operand(node)
        if operand is None:
            return Reject("not-a-noop", "an operand changed since it was matched", node)
        if keeps_layout(node):
            return Noop(node, operand)
        if node in layout_matters(graph):
            return Reject(
                "layout-needed",
                "an op that follows reads the layout that this copy makes",
                node,
                "let canonicalize_views run before: a reshape needs no layout",
            )
        if _is_returned(node) and _is_held(operand, node):
            return Reject(
                "copy-returned",
                "the caller would get the memory of an input, a weight or another output",
                node,
            )
        return Noop(node, operand)

    def rewrite(self, builder: GraphBuilder, bound: Noop) -> None:
        """Let the users read the operand."""
        history = bound.node.meta["history"]
        bound.operand.meta["history"] = bound.operand.meta["history"] | history
        bound.node.replace_all_uses_with(bound.operand)
        builder.graph.fx_graph.erase_node(bound.node)


def _is_returned(node: fx.Node, apart_from: fx.Node | None = None) -> bool:
    """True when an output may be in the memory of `node`, other than by way of `apart_from`."""
    return any(
        user.op == "output" or (may_alias(user) and _is_returned(user, apart_from))
        for user in node.users
        if user is not apart_from
    )


def _is_held(operand: fx.Node, copy: fx.Node) -> bool:
    """True when the caller or the program holds the memory of `operand`, whatever `copy` does."""
    while may_alias(operand):
        operand = operand.all_input_nodes[0]
    return operand.op != "call_function" or _is_returned(operand, copy)


def _operand(node: fx.Node) -> fx.Node | None:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    operand = node.args[0]
    before, after = operand.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None
    if before.dtype != after.dtype or before.device != after.device:
        return None
    if str(tuple(before.shape)) != str(tuple(after.shape)):
        return None
    return operand if _returns_operand(node, before) else None


def _returns_operand(node: fx.Node, value: Tensor) -> bool:
    if is_call(node, *_COPIES, *_SHAPES):
        return True
    if is_call(node, aten.dropout.default):
        return not argument(node, "train") or argument(node, "p") == 0
    if is_call(node, aten.slice.Tensor):
        return bool(argument(node, "step") == 1)
    other: Any = node.args[1] if len(node.args) > 1 else None
    if isinstance(other, bool) or not isinstance(other, (int, float)):
        return False
    if is_call(node, *_ONES):
        return other == 1 and node.kwargs.get("rounding_mode") is None
    return is_call(node, *_ZEROS) and other == 0 and not value.is_floating_point()
