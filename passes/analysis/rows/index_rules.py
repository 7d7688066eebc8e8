"""Row rules of the ops that look values up or put them in place, by numbers that a tensor holds.

A constant table may be read at numbers that depend on the tokens; token rows may be read or written
at constant places of their own axes. The place of a value along the token axis or the batch axis
must never come from a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphopt.ir.graph import argument, axis_of, tensor_inputs
from graphopt.ops import embedding_wq
from graphopt.passes.analysis.rows.layout import (
    Axis,
    Rows,
    Rule,
    mixed,
    rank,
    refuse_along,
    row_axis,
    unknown,
)
from graphopt.passes.analysis.rows.product_rules import refuse_as_weight

aten = torch.ops.aten


def _embedding(rows: Rows, node: fx.Node) -> Axis:
    bound = tensor_inputs(node)
    ids = bound.get("indices", bound.get("ids"))
    refuse_as_weight(rows, node, [n for n in node.all_input_nodes if n is not ids])
    return rows.of(ids)


def _take(rows: Rows, node: fx.Node) -> Axis:
    refuse_as_weight(rows, node, [argument(node, "self")])
    return rows.of(argument(node, "index"))


def _index_select(rows: Rows, node: fx.Node) -> Axis:
    table, index = argument(node, "self"), argument(node, "index")
    refuse_along(rows, node, table, [argument(node, "dim")], "picks by number from")
    if not rows.is_constant(table) and not rows.is_constant(index):
        raise mixed(node, "picks from token rows by numbers that depend on the tokens")
    return row_axis(rows, node)


def _indexed(rows: Rows, node: fx.Node) -> None:
    """The rule of `x[i, :, j]`: raises unless every token row picks for itself."""
    table, indices = argument(node, "self"), argument(node, "indices")
    used = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if any(index.meta["val"].dtype in (torch.bool, torch.uint8) for _, index in used):
        raise unknown(node, "picks by a mask, so the number of values depends on them")
    refuse_along(rows, node, table, [axis for axis, _ in used], "picks by number from")
    if not rows.is_constant(table) and not all(rows.is_constant(index) for _, index in used):
        raise mixed(node, "picks from token rows by numbers that depend on the tokens")


def _index(rows: Rows, node: fx.Node) -> Axis:
    _indexed(rows, node)
    return row_axis(rows, node)


def _index_put(rows: Rows, node: fx.Node) -> Axis:
    _indexed(rows, node)
    table, values = argument(node, "self"), argument(node, "values")
    if rows.is_constant(table):
        refuse_as_weight(rows, node, [n for n in node.all_input_nodes if n is not table])
        return None
    if rows.is_constant(values) and rank(values) <= 1:
        return rows.of(table)
    raise unknown(node, "puts values into token rows in a way that is not analysed")


def _gather(rows: Rows, node: fx.Node) -> Axis:
    """Out element [.., i, ..] is the table's element at index[.., i, ..], on every other axis at
    its own place: those axes must not number token rows, unless both number the same ones."""
    table, index = argument(node, "self"), argument(node, "index")
    axis = rows.of(index)
    dim = axis_of(argument(node, "dim"), rank(node))
    refuse_along(rows, node, table, [dim], "looks values up along")
    if rows.of(table) is not None:
        _refuse_other_places(rows, node, table, index)
    elif axis not in (None, dim):
        raise mixed(node, "numbers token rows by their place in the sequence")
    return axis


def _refuse_other_places(rows: Rows, node: fx.Node, first: object, second: object) -> None:
    is_same = rows.of(first) == rows.of(second) and rows.batch_of(first) == rows.batch_of(second)
    if not is_same:
        raise mixed(node, "puts token rows beside values that are not theirs")


def _scatter(rows: Rows, node: fx.Node) -> Axis:
    """Writes along `dim`, on every other axis each value at its own place."""
    table, index = argument(node, "self"), argument(node, "index")
    if all(rows.is_constant(operand) for operand in node.all_input_nodes):
        return None
    for operand in (table, index):
        refuse_along(rows, node, operand, [argument(node, "dim")], "puts values along")
    source = tensor_inputs(node).get("src")
    for operand in (index, source):
        if isinstance(operand, fx.Node):
            _refuse_other_places(rows, node, table, operand)
    return rows.of(table)


def _put_slice(rows: Rows, node: fx.Node) -> Axis:
    """slice_scatter and select_scatter: a part of one axis is written, nothing is broadcast."""
    table, source = argument(node, "self"), argument(node, "src")
    dim = axis_of(argument(node, "dim"), rank(table))
    refuse_along(rows, node, table, [dim], "writes a part of")
    axis = rows.of(table)
    if node.target is aten.select_scatter.default and axis is not None:
        axis -= dim < axis
    if rows.of(source) != axis:
        raise mixed(node, "puts token rows beside values that are not theirs")
    return rows.of(table)


def _index_put_along(rows: Rows, node: fx.Node) -> Axis:
    """index_add, index_copy and index_fill at constant places of one axis."""
    table, dim = argument(node, "self"), argument(node, "dim")
    refuse_as_weight(rows, node, [argument(node, "index")])
    refuse_along(rows, node, table, [dim], "puts values along")
    source = tensor_inputs(node).get("source")
    if isinstance(source, fx.Node) and rank(source):
        _refuse_other_places(rows, node, table, source)
    return rows.of(table)


def _lookup(rows: Rows, node: fx.Node) -> Axis:
    """bucketize, searchsorted and isin: each element for itself, in a constant list."""
    names = {"bucketize": "self", "searchsorted": "self", "isin": "elements"}
    name = names[node.target._schema.name.removeprefix("aten::")]  # type: ignore[union-attr]
    operand = argument(node, name)
    lists = [n for n in node.all_input_nodes if n is not operand]
    if any(isinstance(n.meta["val"], Tensor) and rank(n) > 1 for n in lists):
        raise unknown(node, "looks up in a list for each row")
    refuse_as_weight(rows, node, lists)
    return rows.of(operand)


INDEX_RULES: dict[object, Rule] = {
    aten.embedding.default: _embedding,
    embedding_wq.SPEC.overload: _embedding,
    aten.take.default: _take,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.index_put.default: _index_put,
    aten.gather.default: _gather,
    aten.scatter.src: _scatter,
    aten.scatter.value: _scatter,
    aten.scatter.reduce: _scatter,
    aten.scatter.value_reduce: _scatter,
    aten.scatter_add.default: _scatter,
    aten.scatter_reduce.two: _scatter,
    aten.slice_scatter.default: _put_slice,
    aten.select_scatter.default: _put_slice,
    aten.index_add.default: _index_put_along,
    aten.index_copy.default: _index_put_along,
    aten.index_fill.int_Scalar: _index_put_along,
    aten.index_fill.int_Tensor: _index_put_along,
    aten.bucketize.Tensor: _lookup,
    aten.searchsorted.Tensor: _lookup,
    aten.isin.Tensor_Tensor: _lookup,
}
