"""drop_asserts: checks that capture wrote into the graph and that hold by its types.

    before   aten._assert_tensor_metadata(%x, None, None, f32, device=cpu)
    after    (nothing)

Dropped only when the operand's recorded dtype and device are what the assert demands. Asserts about
values (`torch._assert_async`, `torch._check` of a number read from a tensor) are rejected, stay in
the graph and run with it: no cleanup removes them, and a graph that holds one is not served with a
KV cache. Exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphopt.ir.builder import GraphBuilder
from graphopt.ir.graph import Graph, argument, is_call, op_name
from graphopt.passes.base import Pass, Reject, Stage
from graphopt.passes.registry import register

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class ProvenAssert:
    """An assert that holds."""

    node: fx.Node


@register
class DropAsserts(Pass[ProvenAssert]):
    """See the module docstring."""

    name: ClassVar[str] = "drop_asserts"
    stage: ClassVar[Stage] = "cleanup"

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        """Every assert."""
        return [n for n in graph.nodes if n.op == "call_function" and "_assert" in op_name(n)]

    def check(self, graph: Graph, node: fx.Node) -> ProvenAssert | Reject:
        """Compare the claim with the operand's type."""
        if not is_call(node, aten._assert_tensor_metadata.default):
            return Reject("assert-on-values", f"{op_name(node)} depends on values", node)
        operand = argument(node, "a")
        assert isinstance(operand, fx.Node)
        value = operand.meta["val"]
        dtype, device = argument(node, "dtype"), argument(node, "device")
        if argument(node, "size") is not None or argument(node, "stride") is not None:
            return Reject("assert-on-layout", "sizes and strides are not compared", node)
        if dtype not in (None, value.dtype) or (device is not None and device != value.device):
            return Reject("assert-fails", "the operand is not of the asserted type", node)
        return ProvenAssert(node)

    def rewrite(self, builder: GraphBuilder, bound: ProvenAssert) -> None:
        """Erase it; nothing reads an assert."""
        builder.graph.fx_graph.erase_node(bound.node)
