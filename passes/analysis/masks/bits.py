"""Padding masks as numbers: `(1 - m) * low` and its like, for a mask m of zeros and ones.

The value of an input is not known, so `(1 - m) * low + S` is no tree of conditions. When one of the
two values that m may have hides everything, the expression is read as a condition on m, and that m
holds zeros and ones is handed back, to be recorded as an assumption and checked at every call.
Where m is compared only (`m == 0`, `m > 0`), nothing is assumed: a condition holds for any integer.
"""

from __future__ import annotations

from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks.algebra import Expr, Read
from graphopt.passes.analysis.masks.arithmetic import float_leaf
from graphopt.passes.analysis.masks.numbers import CONVERSIONS, FOLDED, converted
from graphopt.passes.analysis.masks.scores import shows_nothing
from graphopt.passes.analysis.masks.values import MaskValues, axis


def with_value(e: Expr, read: Read, value: int) -> Expr:
    """The expression with an integer element known."""
    if e == read:
        return ia.integer(value)
    if isinstance(e, (ia.Num, ia.Var, Read)):
        return e
    if isinstance(e, ia.Sum):
        total: Expr = ia.integer(e.constant)
        for atom, coefficient in e.terms:
            total = ia.add(total, with_value(atom, read, value), coefficient)
        return total
    args = tuple(with_value(a, read, value) for a in e.args)
    if e.op in FOLDED:
        return ia.over_leaves(
            args[0], lambda x: ia.over_leaves(args[1], lambda y: float_leaf(e.op, x, y))
        )
    if e.op in CONVERSIONS:
        return ia.over_leaves(args[0], lambda x: converted(e.op, x))
    return ia.rebuild(e.op, args)


def read_bits(values: MaskValues, element: Expr) -> tuple[Expr, tuple[str, ...]]:
    """The scores with padding bits, read at (batch, key) alone, as conditions, and the inputs that
    hold zeros and ones if this is right."""
    assumed: list[str] = []
    for read in sorted(_counted(element), key=repr):
        at = ia.variables(read)
        if not values.may_be_bits(read) or axis(3) not in at or not at <= {axis(0), axis(3)}:
            continue
        one, zero = (with_value(element, read, value) for value in (1, 0))
        if shows_nothing(one) or shows_nothing(zero):
            is_set = ia.negate(ia.equal(read, ia.integer(0)))
            element = ia.choose(is_set, one, zero)
            node = values.named(read.tensor)
            assert node is not None
            assumed.append(str(node.target))
    return element, tuple(dict.fromkeys(assumed))


def _counted(e: Expr) -> frozenset[Read]:
    """Elements that are computed with; those in conditions are only compared."""
    if isinstance(e, ia.Call) and e.op == "where":
        return _counted(e.args[1]) | _counted(e.args[2])
    return frozenset() if ia.kind_of(e) == "bool" else ia.reads(e)
