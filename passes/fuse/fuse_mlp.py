"""fuse_mlp: gated activations become one op.

    before   silu(gate) * up               gelu(gate) * up
    after    graphopt.swiglu(gate, up)     graphopt.geglu(gate, up, approximate=...)

Anchored on the activation. Gate and up must have the same shape and dtype, and the activation no
other user. An activation that is not multiplied (GPT-2's MLP) is rejected.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphopt.ir.builder import GraphBuilder, replace
from graphopt.ir.graph import Graph, argument, dtype_of, is_call, shape_of
from graphopt.ops import geglu, swiglu
from graphopt.passes.base import Pass, Reject, Stage, Tier
from graphopt.passes.registry import register

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Gated:
    """`product` is activation(gate) * up."""

    product: fx.Node
    activation: fx.Node
    gate: fx.Node
    up: fx.Node


@register
class FuseMlp(Pass[Gated]):
    """See the module docstring."""

    name: ClassVar[str] = "fuse_mlp"
    stage: ClassVar[Stage] = "fuse"
    tier: ClassVar[Tier] = Tier("reassociating", 1e-6)

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        """Every silu and gelu."""
        return [n for n in graph.nodes if is_call(n, aten.silu.default, aten.gelu.default)]

    def check(self, graph: Graph, node: fx.Node) -> Gated | Reject:
        """One user, a multiplication by something of the same shape."""
        users = list(node.users)
        if len(users) != 1 or not is_call(users[0], aten.mul.Tensor):
            return Reject("not-gated", "the activation is not multiplied by an up projection", node)
        (product,) = users
        up = product.args[1] if product.args[0] is node else product.args[0]
        if not isinstance(up, fx.Node) or up is node:
            return Reject("not-gated", "the activation is multiplied by a number or itself", node)
        same = dtype_of(up) == dtype_of(node) and str(shape_of(up)) == str(shape_of(node))
        if not same:
            return Reject("gate-shape", "gate and up differ in shape or dtype", product)
        gate = node.args[0]
        assert isinstance(gate, fx.Node)
        return Gated(product, node, gate, up)

    def rewrite(self, builder: GraphBuilder, bound: Gated) -> None:
        """Emit the gated op where the product stood."""
        like = [bound.product, bound.activation]
        with builder.at(bound.product):
            if is_call(bound.activation, aten.silu.default):
                new = builder.emit(swiglu.SPEC.overload, [bound.gate, bound.up], like=like)
            else:
                kind = argument(bound.activation, "approximate")
                operands, attributes = [bound.gate, bound.up], {"approximate": kind}
                new = builder.emit(geglu.SPEC.overload, operands, attributes, like=like)
        new.meta["layer"] = bound.product.meta["layer"]
        replace(builder.graph, bound.product, new)
