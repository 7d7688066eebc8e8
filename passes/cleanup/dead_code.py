"""dead_code: calls whose result nobody reads, and that write nothing, are removed.

The manager removes what a pass leaves behind; this pass exists to do it on its own, with a count.
Exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graphopt.ir.builder import GraphBuilder
from graphopt.ir.graph import Graph, op_name
from graphopt.ir.opset import checks_values, is_impure
from graphopt.passes.base import Pass, Reject, Stage
from graphopt.passes.registry import register


@dataclass(frozen=True, slots=True)
class DeadNode:
    """A call without users."""

    node: fx.Node


@register
class DeadCode(Pass[DeadNode]):
    """See the module docstring."""

    name: ClassVar[str] = "dead_code"
    stage: ClassVar[Stage] = "cleanup"
    after: ClassVar[tuple[str, ...]] = ("common_subexpressions", "fold_constants")

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        """Unused calls, users before operands."""
        unused: list[fx.Node] = []
        dead: set[fx.Node] = set()
        for node in reversed(list(graph.nodes)):
            if node.op == "call_function" and dead.issuperset(node.users):
                unused.append(node)
                if not _has_effect(node):
                    dead.add(node)
        return unused

    def check(self, graph: Graph, node: fx.Node) -> DeadNode | Reject:
        """Ops that write stay, and asserts about values."""
        if _has_effect(node):
            return Reject("has-effect", f"{op_name(node)} writes or checks something", node)
        return DeadNode(node)

    def rewrite(self, builder: GraphBuilder, bound: DeadNode) -> None:
        """Erase it."""
        builder.graph.fx_graph.erase_node(bound.node)


def _has_effect(node: fx.Node) -> bool:
    return is_impure(node.target) or checks_values(node.target)
