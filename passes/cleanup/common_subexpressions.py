"""common_subexpressions: equal calls on equal operands are computed once.

    before   %1 = aten.unsqueeze(%c, 1) ... %9 = aten.unsqueeze(%c, 1)
    after    users of %9 read %1

Only deterministic ops that write nothing, and numbers that are the same bit for bit: 0.0 and -0.0
are different. Exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from graphopt.ir.builder import GraphBuilder
from graphopt.ir.graph import Graph
from graphopt.ir.opset import is_pure
from graphopt.passes.base import Pass, Reject, Stage
from graphopt.passes.registry import register


@dataclass(frozen=True, slots=True)
class Duplicate:
    """`node` computes what `first` has computed."""

    node: fx.Node
    first: fx.Node


@register
class CommonSubexpressions(Pass[Duplicate]):
    """See the module docstring."""

    name: ClassVar[str] = "common_subexpressions"
    stage: ClassVar[Stage] = "cleanup"
    after: ClassVar[tuple[str, ...]] = ("remove_noops", "canonicalize_views")

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        """Nodes whose value an earlier node has, assuming the earlier duplicates are merged."""
        return _duplicates(graph)

    def check(self, graph: Graph, node: fx.Node) -> Duplicate | Reject:
        """Find the first of its kind; operands merged before make this a plain comparison."""
        key = _key(node)
        for other in graph.nodes:
            if other is node:
                break
            if other.target is node.target and _key(other) == key:
                return Duplicate(node, other)
        return Reject("not-a-duplicate", "an operand differs", node)

    def rewrite(self, builder: GraphBuilder, bound: Duplicate) -> None:
        """Let the users read the first one."""
        bound.first.meta["history"] = bound.first.meta["history"] | bound.node.meta["history"]
        bound.node.replace_all_uses_with(bound.first)
        builder.graph.fx_graph.erase_node(bound.node)


def _duplicates(graph: Graph) -> list[fx.Node]:
    first: dict[Any, fx.Node] = {}
    same: dict[fx.Node, fx.Node] = {}
    found = []
    for node in graph.nodes:
        if node.op != "call_function" or not is_pure(node.target):
            continue
        key = _key(node, same)
        if key in first:
            same[node] = first[key]
            found.append(node)
        else:
            first[key] = node
    return found


def _key(node: fx.Node, same: dict[fx.Node, fx.Node] | None = None) -> Any:
    same = same or {}

    def freeze(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return same.get(value, value)
        if isinstance(value, (list, tuple)):
            return tuple(freeze(v) for v in value)
        if isinstance(value, dict):
            return tuple(sorted((k, freeze(v)) for k, v in value.items()))
        # Equal floats may be different numbers: 0.0 and -0.0. Equal text is the same number.
        return (type(value), repr(value) if isinstance(value, (float, complex)) else value)

    return (node.target, freeze(node.args), freeze(dict(node.kwargs)))
