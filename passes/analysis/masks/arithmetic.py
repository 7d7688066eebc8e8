"""Mask rules of arithmetic, comparisons, logic and choices; see `values.py`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.ir.graph import argument, dtype_of, is_call
from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks.algebra import Expr
from graphopt.passes.analysis.masks.numbers import FOLDED, is_no_bound, within
from graphopt.passes.analysis.masks.values import (
    MaskValues,
    Rule,
    argument_or,
    as_kind,
    axis,
    kind,
    operands,
)

aten = torch.ops.aten

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
}


# Whole floats up to here are exact in float32.
_LARGEST_WHOLE = 1 << 24


def _whole(e: Expr) -> Expr | None:
    """The integer that a float expression surely is."""
    if isinstance(e, ia.Call) and e.op == "float":
        return e.args[0]
    if isinstance(e, ia.Num) and float(e.value).is_integer() and abs(e.value) < _LARGEST_WHOLE:
        return ia.integer(int(e.value))
    return None


def float_leaf(op: str, x: Expr, y: Expr) -> Expr:
    """An operation of FOLDED on floats, folded for numbers and neutral elements."""
    if isinstance(x, ia.Num) and isinstance(y, ia.Num):
        if op == "div" and y.value == 0:
            return ia.Call(op, (x, y))
        # 0 * inf is what a float gives, too: nan, which no test below takes for a number.
        return ia.real(FOLDED[op](float(x.value), float(y.value)))
    zero, one = ia.real(0), ia.real(1)
    if (op in ("add", "sub") and y == zero) or (op in ("mul", "div") and y == one):
        return x
    if (op == "add" and x == zero) or (op == "mul" and x == one):
        return y
    whole_x, whole_y = _whole(x), _whole(y)
    if op in ("add", "sub") and whole_x is not None and whole_y is not None:
        return ia.Call("float", (ia.add(whole_x, whole_y, 1 if op == "add" else -1),))
    return ia.Call(op, (x, y))


def _arithmetic(op: str) -> Rule:
    def rule(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
        if argument_or(node, "alpha", 1) != 1 or argument_or(node, "rounding_mode", None):
            return _floor_divide(values, node, sizes) if op == "div" else None
        wanted = kind(dtype_of(node))
        pair = operands(values, node, sizes, wanted)
        if pair is None:
            return None
        x, y = pair
        for a, b in ((x, y), (y, x)):
            if op in ("min", "max") and is_no_bound(op, b, dtype_of(node)):
                return within(op, a, b)
        if wanted == "float":
            return ia.over_leaves(x, lambda a: ia.over_leaves(y, lambda b: float_leaf(op, a, b)))
        if wanted == "bool":
            return ia.all_of(x, y) if op == "mul" else None
        if not (_is_tree(x) or _is_tree(y)) and _is_beyond(op, x, y):
            return None
        return ia.over_leaves(x, lambda a: ia.over_leaves(y, lambda b: _int_leaf(op, a, b)))

    return rule


def _is_tree(e: Expr) -> bool:
    return isinstance(e, ia.Call) and e.op == "where"


def _is_beyond(op: str, x: Expr, y: Expr) -> bool:
    """No linear sum, and no number: better an element of the node itself."""
    numbers = isinstance(x, ia.Num) + isinstance(y, ia.Num)
    return op not in ("add", "sub") and numbers < (1 if op == "mul" else 2)


def _int_leaf(op: str, x: Expr, y: Expr) -> Expr:
    if op in ("add", "sub"):
        return ia.add(x, y, 1 if op == "add" else -1)
    if _is_beyond(op, x, y):
        return ia.Call(f"int_{op}", (x, y))
    if isinstance(x, ia.Num) and isinstance(y, ia.Num):
        return ia.integer(int(FOLDED[op](x.value, y.value)))
    number, other = (x, y) if isinstance(x, ia.Num) else (y, x)
    return ia.times(other, int(ia.parts(number)[1]))


def _reverse_subtract(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    wanted = kind(dtype_of(node))
    pair = operands(values, node, sizes, wanted)
    if pair is None or argument_or(node, "alpha", 1) != 1:
        return None
    leaf = float_leaf if wanted == "float" else _int_leaf
    y, x = pair
    return ia.over_leaves(x, lambda a: ia.over_leaves(y, lambda b: leaf("sub", a, b)))


def _negative(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    x = values.element(node.args[0], sizes)
    if x is None:
        return None
    if kind(dtype_of(node)) == "float":
        return ia.over_leaves(x, lambda a: float_leaf("mul", a, ia.real(-1)))
    return ia.over_leaves(x, lambda a: ia.times(a, -1))


def _absolute(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    x = values.element(node.args[0], sizes)
    if x is None:
        return None
    is_int = ia.kind_of(x) == "int"
    return ia.over_leaves(x, ia.magnitude if is_int else lambda leaf: ia.Call("abs", (leaf,)))


def _tanh(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    """Of scores, in a softcap; of a number it stays a call."""
    x = values.element(node.args[0], sizes)
    return None if x is None else ia.over_leaves(x, lambda leaf: ia.Call("tanh", (leaf,)))


def _floor_divide(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    x, divisor = values.element(node.args[0], sizes), node.args[1]
    is_floor = argument_or(node, "rounding_mode", "floor") == "floor"
    positive = isinstance(divisor, int) and divisor > 0
    if x is None or not positive or not is_floor or ia.kind_of(x) != "int":
        return None
    assert isinstance(divisor, int)
    return ia.over_leaves(x, lambda a: ia.floor_divide(a, divisor))


def _remainder(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    x, divisor = values.element(node.args[0], sizes), node.args[1]
    if x is None or not isinstance(divisor, int) or divisor <= 0 or ia.kind_of(x) != "int":
        return None
    return ia.over_leaves(x, lambda a: ia.remainder(a, divisor))


def _compare_leaf(op: str, x: Expr, y: Expr) -> Expr:
    if isinstance(x, ia.Num) and isinstance(y, ia.Num):
        return ia.number(_COMPARE[op](x.value, y.value))
    if "float" in (ia.kind_of(x), ia.kind_of(y)):
        whole_x, whole_y = _whole(x), _whole(y)
        if whole_x is None or whole_y is None:
            return ia.Call(op, (x, y))
        x, y = whole_x, whole_y
    if op == "eq":
        return ia.equal(x, y)
    if op == "ne":
        return ia.negate(ia.equal(x, y))
    if op in ("gt", "ge"):
        op, x, y = {"gt": "lt", "ge": "le"}[op], y, x
    return ia.less_equal(x if op == "le" else ia.add(x, ia.integer(1)), y)


def _comparison(op: str) -> Rule:
    def rule(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
        pair = operands(values, node, sizes)
        if pair is None:
            return None
        x, y = pair
        if ia.kind_of(x) == "bool":
            if op not in ("eq", "ne"):
                return None
            same = ia.equal(x, y)
            return same if op == "eq" else ia.negate(same)
        return ia.over_leaves(x, lambda a: ia.over_leaves(y, lambda b: _compare_leaf(op, a, b)))

    return rule


def _logical(combine: Callable[..., Expr], bitwise: bool) -> Rule:
    def rule(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
        if bitwise and dtype_of(node) != torch.bool:
            return None
        pair = operands(values, node, sizes, "bool")
        return None if pair is None else combine(*pair)

    return rule


def _exclusive_or(x: Expr, y: Expr) -> Expr:
    return ia.negate(ia.equal(x, y))


def _not(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    x = values.element(node.args[0], sizes)
    if x is None or (ia.kind_of(x) != "bool" and is_call(node, aten.bitwise_not.default)):
        return None
    as_bool = as_kind(values, x, "bool", torch.float32)
    return None if as_bool is None else ia.negate(as_bool)


def _where(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    parts = [values.element(value, sizes) for value in node.args[:3]]
    if any(part is None for part in parts):
        return None
    condition, yes, no = (part for part in parts if part is not None)
    wanted, dtype = kind(dtype_of(node)), dtype_of(node)
    leaves = [as_kind(values, leaf, wanted, dtype) for leaf in (yes, no)]
    if leaves[0] is None or leaves[1] is None or ia.kind_of(condition) != "bool":
        return None
    return ia.choose(condition, leaves[0], leaves[1])


def _masked_fill(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    x, condition, fill = (values.element(value, sizes) for value in node.args[:3])
    if x is None or condition is None or fill is None or ia.kind_of(condition) != "bool":
        return None
    wanted = as_kind(values, fill, kind(dtype_of(node)), dtype_of(node))
    return None if wanted is None else ia.choose(condition, wanted, x)


def _triangle(upper: bool) -> Rule:
    def rule(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
        x, shift = values.element(node.args[0], sizes), argument(node, "diagonal")
        if x is None or not isinstance(shift, int):
            return None
        i, j = axis(len(sizes) - 2), axis(len(sizes) - 1)
        moved = ia.add(i, ia.integer(shift))
        keep = ia.less_equal(moved, j) if upper else ia.less_equal(j, moved)
        zero = as_kind(values, ia.FALSE, kind(dtype_of(node)), dtype_of(node))
        return None if zero is None else ia.choose(keep, x, zero)

    return rule


def overloads(*packets: Any) -> list[Any]:
    """All overloads of some ops."""
    return [getattr(packet, name) for packet in packets for name in packet.overloads()]


ARITHMETIC: dict[object, Rule] = {
    **dict.fromkeys(overloads(aten.add), _arithmetic("add")),
    **dict.fromkeys(overloads(aten.sub), _arithmetic("sub")),
    **dict.fromkeys(overloads(aten.mul), _arithmetic("mul")),
    **dict.fromkeys(overloads(aten.div), _arithmetic("div")),
    **dict.fromkeys((aten.minimum.default, aten.min.other), _arithmetic("min")),
    **dict.fromkeys((aten.maximum.default, aten.max.other), _arithmetic("max")),
    **dict.fromkeys(overloads(aten.rsub), _reverse_subtract),
    aten.neg.default: _negative,
    aten.abs.default: _absolute,
    aten.tanh.default: _tanh,
    **dict.fromkeys(overloads(aten.floor_divide), _floor_divide),
    **dict.fromkeys(overloads(aten.remainder), _remainder),
    **{
        overload: _comparison(name)
        for name in _COMPARE
        for overload in (getattr(aten, name).Tensor, getattr(aten, name).Scalar)
    },
    **dict.fromkeys(
        (
            aten.bitwise_and.Tensor,
            aten.bitwise_and.Scalar,
            aten.__and__.Tensor,
            aten.__and__.Scalar,
        ),
        _logical(ia.all_of, bitwise=True),
    ),
    **dict.fromkeys(
        (aten.bitwise_or.Tensor, aten.bitwise_or.Scalar, aten.__or__.Tensor, aten.__or__.Scalar),
        _logical(ia.any_of, bitwise=True),
    ),
    **dict.fromkeys(
        (aten.bitwise_xor.Tensor, aten.__xor__.Tensor), _logical(_exclusive_or, bitwise=True)
    ),
    aten.logical_and.default: _logical(ia.all_of, bitwise=False),
    aten.logical_or.default: _logical(ia.any_of, bitwise=False),
    aten.logical_xor.default: _logical(_exclusive_or, bitwise=False),
    aten.logical_not.default: _not,
    aten.bitwise_not.default: _not,
    **dict.fromkeys(overloads(aten.where), _where),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_fill),
    aten.tril.default: _triangle(upper=False),
    aten.triu.default: _triangle(upper=True),
}
