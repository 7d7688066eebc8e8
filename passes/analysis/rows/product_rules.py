"""Row rules of the ops that multiply and sum: linear layers, products, einsum, convolutions.

An axis that is summed over must not number token rows or batch items; where both operands hold
token rows, the rows must meet one by one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from graphopt.ir.graph import argument
from graphopt.ops import linear_wq
from graphopt.passes.analysis.rows.layout import (
    Axis,
    Rows,
    Rule,
    batch_mixed,
    mixed,
    rank,
    refuse_along,
    row_axis,
    unknown,
)

aten = torch.ops.aten


def refuse_as_weight(rows: Rows, node: fx.Node, operands: Iterable[object]) -> None:
    """Raise when one of `operands` depends on the tokens."""
    for operand in operands:
        if rows.of(operand) is not None:
            raise mixed(node, "uses token rows as a weight")
        if rows.batch_of(operand) is not None:
            raise batch_mixed(node, "uses batch items as a weight")


def _linear(rows: Rows, node: fx.Node) -> Axis:
    operand = node.args[0]
    refuse_as_weight(rows, node, [n for n in node.all_input_nodes if n is not operand])
    refuse_along(rows, node, operand, [-1], "sums over")
    return rows.of(operand)


def _product(rows: Rows, node: fx.Node, left: fx.Node, right: fx.Node) -> Axis:
    refuse_along(rows, node, left, [-1], "sums over")
    refuse_along(rows, node, right, [max(rank(right) - 2, 0)], "sums over")
    from_end = [a - rank(n) for n in (left, right) if (a := rows.of(n)) is not None]
    # The axes before the last two are paired one by one.
    if len(from_end) == 2 and max(from_end) >= -2:
        raise mixed(node, "multiplies token rows with each other (unrecognised attention?)")
    return row_axis(rows, node)


def _matmul(rows: Rows, node: fx.Node) -> Axis:
    left, right = node.args[:2]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    return _product(rows, node, left, right)


def _matmul_and_add(rows: Rows, node: fx.Node) -> Axis:
    """addmm, baddbmm, addmv: the first operand is added with broadcasting."""
    _, left, right = node.args[:3]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    return _product(rows, node, left, right)


def _outer(rows: Rows, node: fx.Node) -> Axis:
    return row_axis(rows, node)


def _tensordot(rows: Rows, node: fx.Node) -> Axis:
    for name, dims in (("self", "dims_self"), ("other", "dims_other")):
        refuse_along(rows, node, argument(node, name), argument(node, dims), "sums over")
    return row_axis(rows, node)


def _einsum(rows: Rows, node: fx.Node) -> Axis:
    """Every label of the token axis or the batch axis must stand in the result, and at most once in
    an operand."""
    equation, operands = str(argument(node, "equation")).replace(" ", ""), argument(node, "tensors")
    taken, arrow, given = equation.partition("->")
    terms = taken.split(",")
    if not arrow:
        letters = sorted({c for c in taken if c.isalpha()})
        given = "..." + "".join(c for c in letters if taken.count(c) == 1)
    for term, operand in zip(terms, operands, strict=True):
        for axis in (rows.of(operand), rows.batch_of(operand)):
            if axis is None:
                continue
            label = _label(term, axis, rank(operand))
            if label and (label not in given or term.count(label) > 1):
                refuse_along(rows, node, operand, [axis], "sums over")
    return row_axis(rows, node)


def _label(term: str, axis: int, rank_: int) -> str:
    """The letter of an axis; "" for axes under the dots, which einsum keeps and pairs."""
    before, dots, after = term.partition("...")
    if not dots or axis < len(before):
        return term[axis]
    from_end = axis - rank_
    return after[from_end] if -from_end <= len(after) else ""


def _convolution(rows: Rows, node: fx.Node) -> Axis:
    operand, weight = node.args[:2]
    axis = rows.of(operand)
    refuse_as_weight(rows, node, [n for n in node.all_input_nodes if n is not operand])
    if axis is None or axis < 2:
        raise mixed(node, "convolves token rows in a way that is not analysed")
    place = axis - 2
    if node.target is not aten.conv1d.default:
        raise mixed(node, "slides over the token axis, so a row depends on its neighbours")
    assert isinstance(weight, fx.Node)
    width = weight.meta["val"].shape[axis]
    step, margin = argument(node, "stride"), argument(node, "padding")
    if width != 1 or step[place % len(step)] != 1 or margin[place % len(margin)] != 0:
        raise mixed(node, "slides over the token axis, so a row depends on its neighbours")
    return axis


def _bilinear(rows: Rows, node: fx.Node) -> Axis:
    first, second = node.args[:2]
    refuse_as_weight(rows, node, [n for n in node.all_input_nodes if n not in (first, second)])
    for operand in (first, second):
        refuse_along(rows, node, operand, [-1], "sums over")
    return row_axis(rows, node)


def _sum_of_batch(rows: Rows, node: fx.Node) -> Axis:
    if all(rows.is_constant(operand) for operand in node.all_input_nodes):
        return None
    raise unknown(node, "sums products over its first axis")


PRODUCT_RULES: dict[object, Rule] = {
    aten.linear.default: _linear,
    linear_wq.SPEC.overload: _linear,
    aten.addmm.default: _matmul_and_add,
    aten.baddbmm.default: _matmul_and_add,
    aten.addmv.default: _matmul_and_add,
    aten.addbmm.default: _sum_of_batch,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.matmul.default: _matmul,
    aten.linalg_matmul.default: _matmul,
    aten.mv.default: _matmul,
    aten.dot.default: _matmul,
    aten.outer.default: _outer,
    aten.ger.default: _outer,
    aten.tensordot.default: _tensordot,
    aten.einsum.default: _einsum,
    aten.bilinear.default: _bilinear,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.convolution.default: _convolution,
}
