"""Mask rules of ops on numbers: whatever is computed from constants alone is one, by torch itself.

`pointwise` is the rule of every op without one of its own: when each operand is a tree of
conditions over numbers, so is the result, computed by the op in the operands' dtypes. Logarithms
of padding bits stay calls, for `bits.py`. A bound of scores that no finite number passes (the
lowest number of the dtype) is no bound.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.graph import argument, dtype_of, is_call
from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks.algebra import Expr
from graphopt.passes.analysis.masks.values import MaskValues, Rule, as_kind

aten = torch.ops.aten
_MOST_CASES = 64


def _largest(x: float, y: float) -> float:
    return math.nan if math.isnan(x) or math.isnan(y) else max(x, y)


def _smallest(x: float, y: float) -> float:
    return math.nan if math.isnan(x) or math.isnan(y) else min(x, y)


FOLDED: dict[str, Callable[[float, float], float]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "min": _smallest,
    "max": _largest,
}
"""Operations on floats; a division by zero is not folded by it."""


def pointwise(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    """An elementwise op on numbers."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.pointwise not in tags or torch.Tag.nondeterministic_seeded in tags:
        return None
    elements = [values.element(operand, sizes) for operand in node.all_input_nodes]
    cases = math.prod(1 if e is None else _leaves(e) for e in elements)
    if not elements or cases > _MOST_CASES or any(e is None or not _is_known(e) for e in elements):
        return None
    return _by_case(node, [e for e in elements if e is not None], [])


def _by_case(node: fx.Node, elements: list[Expr], chosen: list[ia.Num]) -> Expr:
    if not elements:
        return _computed(node, chosen)

    def with_leaf(leaf: Expr) -> Expr:
        assert isinstance(leaf, ia.Num)
        return _by_case(node, elements[1:], [*chosen, leaf])

    return ia.over_leaves(elements[0], with_leaf)


def _computed(node: fx.Node, chosen: list[ia.Num]) -> Expr:
    made = {
        operand: torch.tensor(number.value, dtype=_dtype(operand))
        for operand, number in zip(node.all_input_nodes, chosen, strict=True)
    }
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), made.__getitem__)
    assert callable(node.target)
    result: Tensor = node.target(*args, **kwargs)
    return ia.number(result.to(dtype_of(node)).item())


def _dtype(node: fx.Node) -> torch.dtype:
    value = node.meta["val"]
    return value.dtype if isinstance(value, Tensor) else torch.int64


def _is_known(e: Expr) -> bool:
    if isinstance(e, ia.Call) and e.op == "where":
        return all(_is_known(leaf) for leaf in e.args[1:])
    return isinstance(e, ia.Num)


def _leaves(e: Expr) -> int:
    return sum(map(_leaves, e.args[1:])) if isinstance(e, ia.Call) and e.op == "where" else 1


CONVERSIONS = ("float", "narrow", "log")
"""Calls that make a float of one number; "narrow" in few bits."""


def converted(op: str, leaf: Expr) -> Expr:
    """A call of CONVERSIONS of a leaf; a number when the leaf is one."""
    if not isinstance(leaf, ia.Num):
        return ia.Call(op, (leaf,))
    value = torch.tensor(leaf.value, dtype=torch.float64)
    # Like torch: minus infinity at zero, nan below.
    return ia.real(float(torch.log(value) if op == "log" else value))


def _log(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    x = values.element(node.args[0], sizes)
    x = None if x is None else as_kind(values, x, "float", dtype_of(node))
    if x is None or not all(map(values.may_be_bits, ia.reads(x))) or not ia.reads(x):
        return None

    return ia.over_leaves(x, lambda leaf: converted("log", leaf))


def is_no_bound(op: str, bound: Expr, dtype: torch.dtype) -> bool:
    """max(x, bound) or min(x, bound) is x for every finite x of the dtype."""
    if not isinstance(bound, ia.Num) or not dtype.is_floating_point:
        return False
    limits = torch.finfo(dtype)
    value = float(bound.value)
    return value <= limits.min if op == "max" else value >= limits.max


def _clamp(values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...]) -> Expr | None:
    """Scores between bounds that bound nothing."""
    x = values.element(node.args[0], sizes)
    if x is None or ia.kind_of(x) != "float" or not dtype_of(node).is_floating_point:
        return None
    for op, bound in _bounds(node):
        limit = None if bound is None else values.element(bound, sizes)
        if bound is not None and (limit is None or not is_no_bound(op, limit, dtype_of(node))):
            return None
        if limit is not None:
            x = within(op, x, limit)
    return x


def _bounds(node: fx.Node) -> list[tuple[str, Any]]:
    if is_call(node, aten.clamp_min.default, aten.clamp_min.Tensor):
        return [("max", node.args[1])]
    if is_call(node, aten.clamp_max.default, aten.clamp_max.Tensor):
        return [("min", node.args[1])]
    return [("max", argument(node, "min")), ("min", argument(node, "max"))]


def within(op: str, x: Expr, bound: Expr) -> Expr:
    """`x` after a bound that is none for finite values: infinities become the bound."""
    assert isinstance(bound, ia.Num)
    limit, combine = float(bound.value), FOLDED[op]

    def of_leaf(leaf: Expr) -> Expr:
        return ia.real(combine(float(leaf.value), limit)) if isinstance(leaf, ia.Num) else leaf

    return ia.over_leaves(x, of_leaf)


NUMBERS: dict[object, Rule] = {
    aten.log.default: _log,
    **dict.fromkeys(
        (
            aten.clamp.default,
            aten.clamp.Tensor,
            aten.clamp_min.default,
            aten.clamp_min.Tensor,
            aten.clamp_max.default,
            aten.clamp_max.Tensor,
        ),
        _clamp,
    ),
}
