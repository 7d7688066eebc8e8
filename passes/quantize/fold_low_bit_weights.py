"""fold_low_bit_weights: layers whose weight file is low-bit read the packed codes directly.

    before   y = aten.linear(x, @w, bias)          with @w packed (4 or 8 bits), data on meta
    after    y = graphopt.linear_wq(x, @w.codes, @w.scale, @w.zero, bias, activation="float")

    before   y = aten.embedding(@w, ids)
    after    y = graphopt.embedding_wq(ids, @w.codes, @w.scale, @w.zero, dtype=...)

Exact: the packed weight is the model's weight; nothing is quantized here, and the products stay
in float. Never touches weights that have dense data. A packed weight read by any other op is
rejected with the reader's name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.fx.node import Argument

from graphopt.ir.builder import GraphBuilder, replace
from graphopt.ir.graph import Graph, argument, dtype_of, is_call, op_name
from graphopt.ir.weights import PackedWeight
from graphopt.ops import embedding_wq, linear_wq
from graphopt.passes.base import Pass, Reject, Stage, Tier
from graphopt.passes.registry import register

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class LowBitReader:
    """A layer and the packed weight it reads."""

    node: fx.Node
    name: str
    weight: PackedWeight


@register
class FoldLowBitWeights(Pass[LowBitReader]):
    """See the module docstring."""

    name: ClassVar[str] = "fold_low_bit_weights"
    stage: ClassVar[Stage] = "quantize"
    tier: ClassVar[Tier] = Tier("reassociating", 1e-5)
    required: ClassVar[bool] = True

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        """Every op that reads a packed weight."""
        return [
            user
            for node in graph.nodes
            if node.op == "get_attr" and str(node.target) in graph.packed
            for user in node.users
        ]

    def check(self, graph: Graph, node: fx.Node) -> LowBitReader | Reject:
        """The packed weight must be the weight operand of a linear or an embedding."""
        if is_call(node, aten.linear.default, aten.embedding.default):
            weight = argument(node, "weight")
            if isinstance(weight, fx.Node) and str(weight.target) in graph.packed:
                return LowBitReader(node, str(weight.target), graph.packed[str(weight.target)])
        return Reject(
            "packed-weight-reader",
            f"{op_name(node)} cannot read a packed weight; linear and embedding can. "
            'Load the model with weights="dense" instead.',
            node,
        )

    def rewrite(self, builder: GraphBuilder, bound: LowBitReader) -> None:
        """Register codes, scale and zero as weights and read them."""
        node, packed = bound.node, bound.weight
        parts = {"codes": packed.codes_NKp, "scale": packed.scale_NG, "zero": packed.zero_NG}
        operands: list[Argument] = [
            None if data is None else builder.weight(f"{bound.name}.{part}", data, like=[node])
            for part, data in parts.items()
        ]
        attributes: dict[str, Argument] = {
            "bits": packed.bits,
            "group": packed.group,
            "offset": packed.offset,
        }
        if is_call(node, aten.linear.default):
            new = builder.emit(
                linear_wq.SPEC.overload,
                [argument(node, "input"), *operands, argument(node, "bias")],
                {**attributes, "activation": "float"},
                like=[node],
            )
        else:
            new = builder.emit(
                embedding_wq.SPEC.overload,
                [argument(node, "indices"), *operands],
                {**attributes, "dtype": dtype_of(node)},
                like=[node],
            )
        replace(builder.graph, node, new)
