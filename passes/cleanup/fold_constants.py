"""fold_constants: what depends on weights and numbers only is computed once, now.

    before   %1 = aten.mul(@inv_freq, 2.0)
    after    users of %1 read @folded.inv_freq.0

Only deterministic ops that this package knows, results of at most 1 MB, and weights that have data
(not packed ones). Weights themselves are never changed. Exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from graphopt.ir.builder import GraphBuilder, replace
from graphopt.ir.graph import Graph
from graphopt.ir.opset import is_pure
from graphopt.passes.base import Pass, Reject, Stage
from graphopt.passes.cleanup.layout import layout_matters
from graphopt.passes.registry import register

LARGEST = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A call and its value."""

    node: fx.Node
    value: Tensor


@register
class FoldConstants(Pass[Constant]):
    """See the module docstring."""

    name: ClassVar[str] = "fold_constants"
    stage: ClassVar[Stage] = "cleanup"
    after: ClassVar[tuple[str, ...]] = ("remove_noops",)

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        """Calls on weights only, in order, so that chains fold step by step."""
        constant: set[fx.Node] = set()
        found = []
        for node in graph.nodes:
            if node.op == "get_attr":
                constant.add(node)
            elif node.op == "call_function" and node.all_input_nodes:
                if not constant.issuperset(node.all_input_nodes):
                    continue
                constant.add(node)
                found.append(node)
        return found

    def check(self, graph: Graph, node: fx.Node) -> Constant | Reject:
        """Compute it on the real data."""
        value = node.meta["val"]
        if not is_pure(node.target):
            return Reject("not-deterministic", "the op is random, writes or is unknown", node)
        if not isinstance(value, Tensor) or value.numel() * value.element_size() > LARGEST:
            return Reject("too-large", f"the result is no tensor of at most {LARGEST} bytes", node)
        operands = node.all_input_nodes
        if any(n.op != "get_attr" for n in operands):
            return Reject("operand-not-folded", "an operand was not folded", node)
        data = {n: graph.weights[str(n.target)] for n in operands}
        if any(tensor.device.type == "meta" for tensor in data.values()):
            return Reject("no-data", "a weight is packed", node)
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), data.__getitem__)
        assert callable(node.target)
        with torch.no_grad():
            result = node.target(*args, **kwargs)
        if not result.is_contiguous() and node in layout_matters(graph):
            return Reject("layout-needed", "an op that follows reads the layout of this", node)
        return Constant(node, result.clone(memory_format=torch.contiguous_format))

    def rewrite(self, builder: GraphBuilder, bound: Constant) -> None:
        """Store the value as a weight and read it."""
        source = str(bound.node.all_input_nodes[0].target).removeprefix("folded.")
        stem = source.rstrip("0123456789").rstrip(".") or source
        number = 0
        while f"folded.{stem}.{number}" in builder.graph.weights:
            number += 1
        name = f"folded.{stem}.{number}"
        replace(builder.graph, bound.node, builder.weight(name, bound.value, like=[bound.node]))
