"""Expressions of the index algebra in the language of `graphopt.ops.predicate`."""

from __future__ import annotations

import math

from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks.algebra import Expr

_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "eq": "==",
    "ne": "!=",
}
_FUNCTIONS = ("where", "float", "abs", "min", "max", "bf16", "f16")


class UnwrittenError(Exception):
    """An expression outside the language."""


def text(e: Expr) -> str:
    """The expression. Raises UnwrittenError for operations that the language has not."""
    if isinstance(e, ia.Num):
        if math.isnan(e.value):
            raise UnwrittenError("a number that is none")
        return repr(e.value)
    if isinstance(e, ia.Var):
        return e.name
    if isinstance(e, ia.Read):
        return f"{e.tensor}[{', '.join(map(text, e.indices))}]"
    if isinstance(e, ia.Sum):
        return _sum_text(e.terms, e.constant)
    if e.op in ("ge0", "eq0"):
        return _comparison_text(e)
    if e.op in ("and", "or"):
        return f" {e.op} ".join(f"({text(a)})" if _is_junction(a) else text(a) for a in e.args)
    if e.op == "not":
        return f"not ({text(e.args[0])})"
    if e.op == "floordiv":
        return f"{_grouped(e.args[0])} // {text(e.args[1])}"
    if e.op == "same":
        return f"({text(e.args[0])}) == ({text(e.args[1])})"
    if e.op in _INFIX:
        left, right = map(_grouped, e.args)
        return f"{left} {_INFIX[e.op]} {right}"
    if e.op == "magnitude":
        return f"abs({text(e.args[0])})"
    if e.op not in _FUNCTIONS:
        raise UnwrittenError(e.op)
    return f"{e.op}({', '.join(map(text, e.args))})"


def _grouped(e: Expr) -> str:
    return f"({text(e)})" if _is_compound(e) else text(e)


def _is_compound(e: Expr) -> bool:
    return isinstance(e, ia.Sum) or (
        isinstance(e, ia.Call) and e.op not in (*_FUNCTIONS, "magnitude")
    )


def _is_junction(e: Expr) -> bool:
    return isinstance(e, ia.Call) and e.op in ("and", "or")


def _sum_text(terms: tuple[tuple[Expr, int], ...], constant: int) -> str:
    pieces = [f"{'' if c == 1 else '-' if c == -1 else f'{c} * '}{_factor(a, c)}" for a, c in terms]
    if constant:
        pieces.append(str(constant))
    return " + ".join(pieces).replace("+ -", "- ")


def _factor(e: Expr, coefficient: int) -> str:
    """An atom of a sum; in brackets where its own operator would bind differently."""
    return text(e) if coefficient == 1 else _grouped(e)


def _comparison_text(e: ia.Call) -> str:
    """Negative terms on the left, the others on the right."""
    (inner,) = e.args
    terms, constant = ia.parts(inner)
    left = ia.linear({a: -c for a, c in terms.items() if c < 0}, max(-constant, 0))
    right = ia.linear({a: c for a, c in terms.items() if c > 0}, max(constant, 0))
    return f"{text(left)} {'<=' if e.op == 'ge0' else '=='} {text(right)}"
