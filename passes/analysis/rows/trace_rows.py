"""The row-independence proof: follow the token axis through a captured graph.

`trace_rows` walks the graph once, op by op, with the rules of `rules.py`, and raises
`RowsMixedError` at the first op that lets one token row or batch item see another, that computes
with the length of the sequence, or that has no rule and no parts that have one.
"""

from __future__ import annotations

import operator

import sympy
import torch
from torch import Tensor, fx

from graphopt.ir.graph import Graph, argument, is_call, op_name, shape_of
from graphopt.ir.opset import spec_of
from graphopt.ops import attention
from graphopt.passes.analysis.rows.last_row import check_picked, picks_last_row
from graphopt.passes.analysis.rows.layout import (
    Axis,
    Rows,
    RowsMixedError,
    check_fold,
    check_numbers,
    check_result,
    mixed,
    sizes,
    unknown,
)
from graphopt.passes.analysis.rows.parts import axis_by_parts
from graphopt.passes.analysis.rows.rules import CASTS, RULES, pointwise
from graphopt.passes.analysis.rows.shape_rules import TAKES_SIZES, reshape

aten = torch.ops.aten
_OPERANDS = ("q_BHSD", "k_BGTD", "v_BGTE", "mask", "pad_BT", "sinks_H")
_COMPARES = (
    *(getattr(aten, name).Scalar for name in ("eq", "ne", "lt", "le", "gt", "ge")),
    aten.logical_not.default,
    aten.bitwise_not.default,
)
_LEADS_ON = (*CASTS, *_COMPARES, aten.unsqueeze.default, aten.squeeze.dims)
_SIZE_READS = (aten.sym_size.int, aten.sym_numel.default)


def trace_rows(graph: Graph, tokens: fx.Node) -> Rows:
    """Row axis of every node, `tokens` being `[batch, sequence]` ids of two symbolic sizes.

    Raises RowsMixedError naming the op in the way.
    """
    batch, sequence = sizes(tokens)
    if not isinstance(batch, sympy.Symbol) or not isinstance(sequence, sympy.Symbol):
        raise RowsMixedError("static-sequence", "batch and sequence are not symbols", tokens)
    rows = Rows(batch, sequence, padding=padding_nodes(graph, tokens))
    for node in graph.nodes:
        if node is tokens:
            rows.axis[node] = 1
        elif node in rows.padding:
            continue
        elif node.op == "placeholder":
            if node.users:
                raise RowsMixedError(
                    "extra-input", f"input %{node.name} is not the token ids", node
                )
        elif node.op == "call_function":
            if picks_last_row(rows, node, graph.weights):
                rows.picked.add(node)
                rows.axis[node] = None
            else:
                _trace(rows, node)
    return rows


def _trace(rows: Rows, node: fx.Node) -> None:
    is_picked = not rows.picked.isdisjoint(node.all_input_nodes)
    if is_picked:
        check_picked(rows, node)
    if isinstance(node.meta["val"], (Tensor, list, tuple)):
        rows.axis[node] = _trace_call(rows, node)
        check_result(rows, node, rows.axis[node])
        if RULES.get(node.target) is not reshape:
            check_fold(rows, node)
        if is_picked and rows.axis[node] is not None:
            raise mixed(node, "spreads the last token row over all rows")
        if is_picked:
            rows.picked.add(node)
    else:
        _check_number(node)


def _trace_call(rows: Rows, node: fx.Node) -> Axis:
    if node.target is operator.getitem:
        return rows.of(node.args[0])
    check_numbers(node, TAKES_SIZES)
    rule = RULES.get(node.target)
    if rule is not None:
        return rule(rows, node)
    target = node.target
    tags = target.tags if isinstance(target, torch._ops.OpOverload) else ()
    spec = spec_of(target)
    is_tagged = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
    if is_tagged or (spec is not None and spec.rows == "pointwise"):
        return pointwise(rows, node)
    if torch.Tag.nondeterministic_seeded in tags:
        raise unknown(node, "draws random numbers")
    if all(rows.is_constant(operand) for operand in node.all_input_nodes):
        # `check_result` refuses it when its sizes are not constant.
        return None
    if spec is not None:
        text = "reads token rows and is not known to keep them apart"
        raise unknown(node, f'{text}; if it does, define it with rows="pointwise"')
    return axis_by_parts(rows, node, _trace)


def _check_number(node: fx.Node) -> None:
    """Calls without a tensor result: sizes and arithmetic on them, and asserts about types."""
    reads_tensor = any(isinstance(n.meta["val"], Tensor) for n in node.all_input_nodes)
    if is_call(node, *_SIZE_READS, aten._assert_tensor_metadata.default):
        return
    if reads_tensor or "_assert" in op_name(node):
        raise unknown(node, "reads values as numbers, which a step cannot do row by row")


def padding_nodes(graph: Graph, tokens: fx.Node) -> frozenset[fx.Node]:
    """Inputs whose only use is the padding operand of attention, directly or through casts and one
    comparison with a number, and what leads there. A serving step has no padding, so they fall
    away: whatever value says that a token is seen, all are."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_padding_input = (
            node.op == "placeholder"
            and node is not tokens
            and list(map(str, shape_of(node))) == list(map(str, shape_of(tokens)))
            and _only_pads(node)
            and len(_compared(node)) <= 1
        )
        if is_padding_input or (is_call(node, *_LEADS_ON) and node.args[0] in found):
            found.add(node)
    return frozenset(found)


def _only_pads(node: fx.Node) -> bool:
    return all(_is_padding_use(node, user) for user in node.users)


def _is_padding_use(node: fx.Node, user: fx.Node) -> bool:
    if user.target is attention.SPEC.overload:
        # Tensors beside the operands are read to hide keys, which a step does not do.
        is_tensor_beside = argument(user, "predicate") or argument(user, "bias")
        others = list(argument(user, "aux") or ()) if is_tensor_beside else []
        uses = [argument(user, name) for name in _OPERANDS] + others
        return uses.count(node) == 1 and argument(user, "pad_BT") is node
    if is_call(user, *_SIZE_READS, aten._assert_tensor_metadata.default):
        # The sizes of a serving step come from the tokens.
        return True
    return is_call(user, *_LEADS_ON) and user.all_input_nodes == [node] and _only_pads(user)


def _compared(node: fx.Node) -> set[fx.Node]:
    """Comparisons that an input leads to: two could not both say that all tokens are seen."""
    found: set[fx.Node] = set()
    for user in node.users:
        if is_call(user, *_LEADS_ON):
            found |= {user} if is_call(user, *_COMPARES) else _compared(user)
    return found
