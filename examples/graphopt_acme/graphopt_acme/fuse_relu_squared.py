"""fuse_relu_squared: relu followed by a square becomes one op.

    before   %2 = aten.relu(%1); %3 = aten.square(%2)
    after    %3 = acme.relu_squared(%1)

Exact. The relu must have no other user.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

import graphopt
from graphopt.ir.builder import GraphBuilder, replace
from graphopt.ir.graph import Graph, is_call
from graphopt.passes.base import Pass, Reject, Stage
from graphopt_acme import relu_squared

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class SquaredRelu:
    """`square` is relu(x) ** 2."""

    square: fx.Node
    relu: fx.Node
    x: fx.Node


@graphopt.register_pass
class FuseReluSquared(Pass[SquaredRelu]):
    """See the module docstring."""

    name: ClassVar[str] = "fuse_relu_squared"
    stage: ClassVar[Stage] = "fuse"
    before: ClassVar[tuple[str, ...]] = ("fuse_mlp",)

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        """Every square."""
        return graph.calls(aten.square.default)

    def check(self, graph: Graph, node: fx.Node) -> SquaredRelu | Reject:
        """Its operand is a relu that nobody else reads."""
        relu = node.args[0]
        if not is_call(relu, aten.relu.default):
            return Reject("not-relu", "the squared value is not a relu", node)
        if len(relu.users) != 1:
            return Reject("relu-shared", "the relu has another user", relu)
        return SquaredRelu(node, relu, relu.args[0])

    def rewrite(self, builder: GraphBuilder, bound: SquaredRelu) -> None:
        """Emit the op where the square stood."""
        like = [bound.square, bound.relu]
        new = builder.emit(relu_squared.SPEC.overload, [bound.x], like=like)
        replace(builder.graph, bound.square, new)
