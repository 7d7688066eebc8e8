"""Dead-node removal that knows which ops write to the KV cache."""

from __future__ import annotations

from graphopt.ir.graph import Graph
from graphopt.ir.opset import checks_values, is_impure


def remove_dead(graph: Graph) -> int:
    """Erase calls and weight reads nobody uses, except ops that write or check; the count."""
    removed = 0
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        if node.op == "call_function" and (is_impure(node.target) or checks_values(node.target)):
            continue
        graph.fx_graph.erase_node(node)
        removed += 1
    graph.prune_weights()
    return removed
