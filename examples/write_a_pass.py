"""A pass of your own: declared, found by name, ordered, verified and counted like the others."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

import graphopt
from graphopt.ir.builder import GraphBuilder, replace
from graphopt.ir.graph import Graph, is_call
from graphopt.passes.base import Pass, Reject, Stage
from graphopt.passes.registry import register

neg = torch.ops.aten.neg.default


@dataclass(frozen=True, slots=True)
class DoubleNegation:
    """`outer` is -(-x)."""

    outer: fx.Node
    x: fx.Node


@register
class FoldDoubleNegation(Pass[DoubleNegation]):
    """-(-x) is x."""

    name: ClassVar[str] = "fold_double_negation"
    stage: ClassVar[Stage] = "cleanup"
    after: ClassVar[tuple[str, ...]] = ("remove_noops",)

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        """Every negation."""
        return graph.calls(neg)

    def check(self, graph: Graph, node: fx.Node) -> DoubleNegation | Reject:
        """Its operand must be one too."""
        inner = node.args[0]
        if not is_call(inner, neg):
            return Reject("single-negation", "the operand is not negated", node)
        return DoubleNegation(node, inner.args[0])

    def rewrite(self, builder: GraphBuilder, bound: DoubleNegation) -> None:
        """Let the users read x."""
        replace(builder.graph, bound.outer, bound.x)


class Model(nn.Module):
    """Negates twice, and once more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """-x, the long way."""
        return torch.neg(torch.neg(torch.neg(x)))


program = graphopt.compile(Model().eval(), torch.randn(2, 4), expect={"fold_double_negation": 1})
for rejection in program.report.rejections("fold_double_negation"):
    print(f"left alone: {rejection.text} ({rejection.source})")
x = torch.randn(3, 4)
assert torch.equal(program(x), -x)
print("one double negation folded")
