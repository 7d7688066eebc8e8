"""quantize_activations: low-bit layers round their input to int8 and multiply integers.

    before   graphopt.linear_wq(x, ..., activation="float")
    after    graphopt.linear_wq(x, ..., activation="int8")

Each group of 32 columns of a row gets its own scale, absmax / 127, at run time: no calibration.
Approximate: measured by perplexity (llama.cpp makes the same choice for its Q4 and Q8 formats).
Needs the columns to be a multiple of 32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graphopt.ir.builder import GraphBuilder, replace
from graphopt.ir.graph import Graph, argument, shape_of
from graphopt.ops import linear_wq
from graphopt.passes.base import Pass, Reject, Stage, Tier
from graphopt.passes.registry import register


@dataclass(frozen=True, slots=True)
class FloatLinear:
    """A low-bit linear that still multiplies floats."""

    node: fx.Node


@register
class QuantizeActivations(Pass[FloatLinear]):
    """See the module docstring."""

    name: ClassVar[str] = "quantize_activations"
    stage: ClassVar[Stage] = "quantize"
    after: ClassVar[tuple[str, ...]] = ("fold_low_bit_weights",)
    tier: ClassVar[Tier] = Tier("approximate", metric="perplexity")

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        """Low-bit linears in float."""
        calls = graph.calls(linear_wq.SPEC.overload)
        return [node for node in calls if argument(node, "activation") == "float"]

    def check(self, graph: Graph, node: fx.Node) -> FloatLinear | Reject:
        """The group of 32 must divide the columns."""
        columns = shape_of(argument(node, "x"))[-1]
        if columns % linear_wq.ACTIVATION_GROUP:
            return Reject(
                "columns-not-grouped",
                f"{columns} input columns are no multiple of {linear_wq.ACTIVATION_GROUP}",
                node,
            )
        return FloatLinear(node)

    def rewrite(self, builder: GraphBuilder, bound: FloatLinear) -> None:
        """Same operands, other attribute."""
        kwargs = {**bound.node.kwargs, "activation": "int8"}
        new = builder.emit(linear_wq.SPEC.overload, bound.node.args, kwargs, like=[bound.node])
        replace(builder.graph, bound.node, new)
