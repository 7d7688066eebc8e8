"""What a graph text does not say about its lines: their cost, and the kernel that runs them.

The text is read back without weights: shapes are all that costs and the planning of kernels need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.codegen import registry as backends
from graphopt.cost.flops_bytes import NodeCost, graph_costs
from graphopt.errors import BackendError, ProgramFormatError, UnsupportedError
from graphopt.inspect.explorer.lines import GraphLine, read_lines
from graphopt.ir.graph import Graph
from graphopt.ir.shapes import DTYPES_BY_NAME
from graphopt.ir.text.parser import parse_graph
from graphopt.record.layers import members

VIEW = "view (no work)"


@dataclass(frozen=True, slots=True)
class Fact:
    """Of one call. kernel: what runs it in the backend, "" where that is not known."""

    cost: NodeCost
    kernel: str = ""


def facts(text: str, batch: int, sequence: int, backend: str) -> list[Fact]:
    """One a call of the text, in order; none when the text cannot be read back (it names ops of a
    user's own that are not loaded)."""
    try:
        graph = parse_graph(text, weights_of(read_lines(text)))
    except ProgramFormatError:
        return []
    costs = graph_costs(graph, batch, sequence)
    kernels = _kernels(graph, backend) if graph.dialect == "serving" else {}
    return [Fact(cost, kernels.get(f"%{n.meta['number']}", "")) for n, cost in costs.items()]


def weights_of(lines: Sequence[GraphLine]) -> dict[str, Tensor]:
    """Weights without data, as the lines declare them."""
    weights = {}
    for line in lines:
        if line.kind != "weight":
            continue
        dtype, _, sizes = line.type.removesuffix("]").partition("[")
        shape = [int(size) for size in sizes.split(",") if size.strip()]
        for name in members(line.id.removeprefix("@")):
            weights[name] = torch.empty(shape, dtype=DTYPES_BY_NAME[dtype], device="meta")
    return weights


def _kernels(graph: Graph, backend: str) -> dict[str, str]:
    """Value -> kernels of the backend's plan; empty when it has no plan for the graph."""
    try:
        calls = backends.find(backend).kernel_calls(graph)
    except (BackendError, UnsupportedError):
        return {}
    found = {f"%{n.meta['number']}": VIEW for n in graph.nodes if n.op == "call_function"}
    for call in calls:
        name = f"native {call.kernel}" if call.is_native else f"torch {call.kernel}"
        before = found.get(call.value, VIEW)
        found[call.value] = name if before == VIEW else f"{before}, {name}"
    return found
