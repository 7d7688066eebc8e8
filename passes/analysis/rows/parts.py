"""An op without a row rule is taken apart into the ops that torch defines it by.

Torch decomposes most of its ops into a small core set. The parts are traced on operands of the same
sizes, over symbols of their own, and the rules of the parts decide: if none of them lets one row
see another, the whole does not either. Decomposed for the proof only: the serving graph keeps the
op as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.ir.graph import op_name
from graphopt.ir.shapes import SymbolicInputs
from graphopt.passes.analysis.rows.layout import Axis, Rows, RowsMixedError, sizes, unknown

Trace = Callable[[Rows, fx.Node], None]
"""Gives the row axis of one call, checks it, and keeps it."""


def axis_by_parts(rows: Rows, node: fx.Node, trace: Trace) -> Axis:
    """Row axis of a call, by the parts of its op. Raises RowsMixedError for the whole op."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    parts = _parts(rows, node) if target.namespace in ("aten", "prims") else None
    if parts is None:
        raise unknown(node, "reads token rows and is not known to keep them apart")
    inner, graph = parts
    try:
        for part in graph.nodes:
            if part.op == "call_function":
                if part.target is target:
                    raise unknown(part, "reads token rows and is not known to keep them apart")
                trace(inner, part)
    except RowsMixedError as refusal:
        text = refusal.text if refusal.node.target is target else f"is made of {refusal.text}"
        text = text.removeprefix(f"{op_name(node)} ")
        raise RowsMixedError(refusal.code, f"{op_name(node)} {text}", node) from None
    if inner.tables:
        raise unknown(node, "cuts a constant to the length of the sequence")
    (returned,) = graph.output_node().args
    results = returned if isinstance(returned, (list, tuple)) else [returned]
    axes = {inner.of(result) for result in results if isinstance(result, fx.Node)}
    if len(axes) != 1:
        raise unknown(node, "gives values whose tokens are on different axes")
    return axes.pop()


def _parts(rows: Rows, node: fx.Node) -> tuple[Rows, fx.Graph] | None:
    """The core ops that a call is made of, on symbols of their own; None when torch has none."""
    operands = node.all_input_nodes
    if not all(isinstance(operand.meta["val"], Tensor) for operand in operands):
        return None
    symbols = SymbolicInputs()
    batch, sequence = symbols.symbol("batch"), symbols.symbol("sequence")
    known = {rows.batch: batch, rows.sequence: sequence}
    fakes = []
    for operand in operands:
        value = operand.meta["val"]
        with symbols.mode:
            shape = [_size(size, known) for size in sizes(operand)]
            fakes.append(torch.empty(shape, dtype=value.dtype))

    def call(*tensors: Tensor) -> Any:
        given = dict(zip(operands, tensors, strict=True))
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), given.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    try:
        with enable_python_dispatcher(), torch.no_grad():
            graph = make_fx(call, dict(core_aten_decompositions()))(*fakes).graph
    except Exception:
        # Whatever stops the decomposition, there is no proof then.
        return None
    inner = Rows(batch.node.expr, sequence.node.expr)
    placeholders = (part for part in graph.nodes if part.op == "placeholder")
    for placeholder, operand in zip(placeholders, operands, strict=True):
        inner.axis[placeholder] = rows.of(operand)
        if operand in rows.sequence_first:
            inner.sequence_first.add(placeholder)
    for part in graph.nodes:
        part.meta.setdefault("val", None)
    return inner, graph


def _size(expression: sympy.Expr, known: dict[sympy.Symbol, torch.SymInt]) -> Any:
    """`expression` over other symbols."""
    if isinstance(expression, sympy.Symbol):
        return known[expression]
    if expression.is_Integer:
        return int(expression)
    parts = [_size(part, known) for part in expression.args]
    if expression.is_Mul:
        result = parts[0]
        for part in parts[1:]:
            result = result * part
        return result
    raise ValueError(f"size {expression}")
