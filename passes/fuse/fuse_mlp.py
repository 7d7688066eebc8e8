"""fuse_mlp: gated activations become one op.

    before   silu(gate) * up               gelu(gate) * up
    after    graphopt.swiglu(gate, up)     graphopt.geglu(gate, up, approximate=...)

Anchored on the activation, as one op or written by hand (`gated_activation.py`). Gate and up have
the same shape and dtype, and the activation no other user; they may be two linears or the two parts
of one. An activation that is not multiplied (GPT-2's MLP) is rejected.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from torch import fx

from graphopt.ir.builder import GraphBuilder, replace
from graphopt.ir.graph import Graph, dtype_of, shape_of
from graphopt.ops import geglu, swiglu
from graphopt.passes.base import Pass, Reject, Stage, Tier, not_floats
from graphopt.passes.fuse.gated_activation import Gated, is_activation, read_gated
from graphopt.passes.registry import register


@register
class FuseMlp(Pass[Gated]):
    """See the module docstring."""

    name: ClassVar[str] = "fuse_mlp"
    stage: ClassVar[Stage] = "fuse"
    tier: ClassVar[Tier] = Tier("reassociating", 1e-6)

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        """Every silu and gelu, and what hand-written ones are built around."""
        return [node for node in graph.nodes if is_activation(node)]

    def check(self, graph: Graph, node: fx.Node) -> Gated | Reject:
        """A product with something of the same shape."""
        gated = read_gated(node)
        if isinstance(gated, Reject):
            return gated
        types = {(dtype_of(n), str(shape_of(n))) for n in (gated.gate, gated.up, gated.product)}
        if len(types) != 1:
            return Reject(
                "gate-shape",
                "gate and up differ in shape or dtype",
                gated.product,
                "give both projections one width and dtype",
            )
        return not_floats("a gated activation", gated.gate) or gated

    def rewrite(self, builder: GraphBuilder, bound: Gated) -> None:
        """Emit the gated op where the product stood."""
        like = [bound.product, bound.gate]
        operands = [bound.gate, bound.up]
        with builder.at(bound.product):
            if bound.kind == "silu":
                new = builder.emit(swiglu.SPEC.overload, operands, like=like)
            else:
                attributes = {"approximate": "tanh" if bound.kind == "tanh" else "none"}
                new = builder.emit(geglu.SPEC.overload, operands, {**attributes}, like=like)
        new.meta["layer"] = bound.product.meta["layer"]
        replace(builder.graph, bound.product, new)
