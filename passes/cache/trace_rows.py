"""The row-independence proof: follow the token axis through a captured graph.

`trace_rows` walks the graph once, op by op, with the rules of `row_rules.py`, and raises
`RowsMixedError` at the first op that lets one token row see another, that computes with the length
of the sequence, or that it has no rule for.
"""

from __future__ import annotations

import sympy
import torch
from torch import Tensor, fx

from graphopt.ir.graph import Graph, argument, op_name, shape_of
from graphopt.ops import attention
from graphopt.passes.cache.row_rules import (
    RULES,
    Axis,
    Rows,
    RowsMixedError,
    filled,
    mixed,
    pointwise,
)

aten = torch.ops.aten

# Ops that take sizes: the sequence length may reach them as a number. Anywhere else it would be
# arithmetic on how long the sequence is, which a token row must not depend on.
_TAKES_SIZES = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten.expand.default,
        aten.arange.default,
        aten.arange.start,
        aten.arange.start_step,
        aten.zeros.default,
        aten.ones.default,
        aten.full.default,
        aten.slice.Tensor,
    }
)


def trace_rows(graph: Graph, tokens: fx.Node) -> dict[fx.Node, Axis]:
    """Row axis of every node, `tokens` being `[batch, sequence]` ids.

    Raises RowsMixedError naming the op in the way.
    """
    batch, sequence = (
        size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)
        for size in shape_of(tokens)
    )
    rows = Rows(sequence, batch if batch.free_symbols else None)
    padding = padding_inputs(graph, tokens)
    for node in graph.nodes:
        if node is tokens:
            rows.axis[node] = 1
        elif node.op == "placeholder":
            if node not in padding and node.users:
                raise RowsMixedError(
                    "extra-input", f"input %{node.name} is not the token ids", node
                )
        elif node.op == "call_function" and isinstance(node.meta["val"], (Tensor, list, tuple)):
            rows.axis[node] = _trace_call(rows, node)
    return rows.axis


def _trace_call(rows: Rows, node: fx.Node) -> Axis:
    if str(getattr(node.target, "__name__", "")) == "getitem":
        return rows.of(node.args[0])
    if node.target not in _TAKES_SIZES:
        for operand in node.all_input_nodes:
            value = operand.meta["val"]
            if isinstance(value, torch.SymInt) and rows.sequence in rows.size(value).free_symbols:
                raise mixed(node, "computes with the length of the sequence")
    rule = RULES.get(node.target)
    if rule is not None:
        return rule(rows, node)
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return pointwise(rows, node)
    if all(rows.of(operand) is None for operand in node.all_input_nodes):
        return filled(rows, node) if isinstance(node.meta["val"], Tensor) else None
    raise RowsMixedError(
        "rows-unknown",
        f"{op_name(node)} reads token rows and is not known to keep them apart",
        node,
    )


def padding_inputs(graph: Graph, tokens: fx.Node) -> set[fx.Node]:
    """Inputs whose only use is the padding operand of attention, directly or through a cast.

    A serving step has no padding, so they fall away."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" and node is not tokens and _only_pads(node):
            found.add(node)
    return found


def _only_pads(node: fx.Node) -> bool:
    for user in node.users:
        if user.target is attention.SPEC.overload:
            others = [argument(user, name) for name in ("q_BHSD", "k_BGTD", "v_BGTE", "mask")]
            if node in others or argument(user, "sinks_H") is node:
                return False
        elif not isinstance(user.meta.get("val"), Tensor) and user.op == "call_function":
            # Its size; the sizes of a serving step come from the tokens.
            continue
        elif op_name(user).startswith(("aten.to", "aten._to_copy", "aten.clone")):
            if not _only_pads(user):
                return False
        else:
            return False
    return True
