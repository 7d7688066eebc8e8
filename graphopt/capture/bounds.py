"""Limits of a capture: the sizes for which the captured road is the model's.

Every answer that the capture gave about sizes (`size_decisions.py`) becomes a condition that the
program checks when it is called, minimum, maximum, multiple, excluded value and conditions of
several sizes alike. Three kinds of answers are none:
- what an op asked about a size being 1 (ops of a graph broadcast for themselves);
- that sizes differ, where an op asked: the op then took its general way, which is right for equal
  sizes as well;
- inequalities, and several questions at once, about how a tensor lies in memory.
A graph is traced with sizes of at least 2: what Python would have decided otherwise for 1 is told
by `turned_by_one`, and settled by `size_one.py`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import sympy
from sympy.logic.boolalg import And, Boolean
from torch.export import ExportedProgram
from torch.utils._sympy.functions import Max, Min, Mod
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from graphopt.capture.size_decisions import Decision, Decisions
from graphopt.errors import CaptureError
from graphopt.ir.limits import Limit, Relation, is_size

_SAMPLES = 257


def limits_of(decisions: Decisions, names: Mapping[str, str]) -> tuple[Limit, ...]:
    """The limits of a capture, each condition once, in the order in which the model asked.

    names: expression text of a symbolic size -> its readable name.
    Raises CaptureError for a condition that no limit can say.
    """
    kept: dict[tuple[Any, ...], Limit] = {}
    rest: list[tuple[sympy.Rel, Decision]] = []
    for decision in _distinct(decisions):
        for relation in _relations(decision, decisions, names):
            limit = _simple(relation, decision, names) or _smallest(relation, decision, names)
            if limit is None:
                rest.append((relation, decision))
            else:
                _keep(kept, limit)
    for limit in _multiples(rest, names):
        _keep(kept, limit)
    lows = dict.fromkeys(names.values(), 2)
    factors = dict.fromkeys(names.values(), 1)
    for limit in kept.values():
        if limit.relation == ">=":
            lows[limit.size] = limit.number
        elif limit.relation == "%":
            factors[limit.size] = limit.number
    for relation, decision in rest:
        values = {
            symbol: _multiple_from(lows[names[str(symbol)]], factors[names[str(symbol)]], symbol)
            for symbol in relation.free_symbols
        }
        if not _is_true(relation, values):
            _keep(kept, _general(relation, decision, names))
    return tuple(kept.values())


def limits_of_exported(program: ExportedProgram, names: Mapping[str, str]) -> tuple[Limit, ...]:
    """The limits of a program that was exported before: the ranges of its sizes."""
    limits = []
    for symbol, bounds in program.range_constraints.items():
        name = names.get(str(symbol))
        if name is None:
            continue
        # An unbounded size has int_oo, which is no sympy.Integer, or the largest int64.
        if isinstance(bounds.upper, sympy.Integer) and bounds.upper < 2**62:
            limits.append(Limit(name, "<=", int(bounds.upper)))
        if isinstance(bounds.lower, sympy.Integer) and bounds.lower > 2:
            limits.append(Limit(name, ">=", int(bounds.lower)))
    return tuple(limits)


def turned_by_one(decisions: Decisions, names: Mapping[str, str]) -> dict[str, Decision]:
    """Name of a size -> the first branch of the model that goes the other way when it is 1."""
    turned: dict[str, Decision] = {}
    for decision in decisions.found.values():
        if not decision.is_branch or decision.is_same_for_one:
            continue
        condition = _current(decision, decisions)
        for symbol in sorted(condition.free_symbols, key=str):
            name = names.get(str(symbol))
            if name is None or name in turned:
                continue
            if _fails_at_one(condition, symbol):
                turned[name] = decision
    return turned


def cause_of_fixed(decisions: Decisions, symbol: str) -> Decision | None:
    """The answer that made a size one number."""
    for decision in decisions.found.values():
        condition = decision.condition
        if isinstance(condition, sympy.Eq) and symbol in map(str, condition.free_symbols):
            return decision
    return None


def _distinct(decisions: Decisions) -> list[Decision]:
    """The first decision of each condition and kind."""
    first: dict[Any, Decision] = {}
    for found in decisions.found.values():
        first.setdefault((found.condition, found.is_branch, found.is_layout), found)
    return list(first.values())


def _current(decision: Decision, decisions: Decisions) -> sympy.Basic:
    """The condition, sizes that turned out to be equal or fixed put in."""
    assert decisions.shape_env is not None
    replaced: sympy.Basic = decisions.shape_env.replace(decision.condition)
    return replaced


def _relations(
    decision: Decision, decisions: Decisions, names: Mapping[str, str]
) -> list[sympy.Rel]:
    """The relations that must hold for the answer to stand; none for an answer without weight."""
    condition = _current(decision, decisions)
    parts = condition.args if isinstance(condition, And) else (condition,)
    kept: list[sympy.Rel] = []
    for part in parts:
        unknown = [s for s in part.free_symbols if str(s) not in names]
        if not part.free_symbols or unknown:
            # Sizes that data decide are checked by asserts of the graph itself.
            continue
        if not isinstance(part, sympy.Rel) and not decision.is_branch:
            continue
        if not isinstance(part, sympy.Rel):
            raise CaptureError(
                f"the model decides at {decision.source or 'an unknown line'} by {part}, a "
                "condition on sizes that cannot be kept as a limit; fix one of the sizes by "
                "leaving it out of dynamic=, or write it as separate comparisons"
            )
        if not decision.is_branch:
            if isinstance(part, sympy.Ne):
                continue
            if decision.is_layout and not isinstance(part, sympy.Eq):
                continue
        normal = _normal(part)
        if normal == sympy.true:
            continue
        kept.append(normal)
    return kept


def _normal(relation: sympy.Rel) -> sympy.Rel:
    """The same relation as `something compared with 0`, what is positive divided out."""
    difference = _without_extremes(relation.lhs - relation.rhs)
    difference = sympy.terms_gcd(sympy.expand(difference))
    factors = difference.args if isinstance(difference, sympy.Mul) else (difference,)
    # Every size is positive.
    left = [f for f in factors if not (f.is_Symbol or (f.is_Integer and f > 0))]
    return relation.func(sympy.Mul(*left) if left else sympy.Integer(1), sympy.Integer(0))


def _without_extremes(expression: sympy.Expr) -> sympy.Expr:
    """The expression with each Min and Max that one operand always is, sizes being positive."""
    more = {
        symbol: 1 + sympy.Symbol(f"more_{symbol}", nonnegative=True)
        for symbol in expression.free_symbols
    }

    def is_never_negative(difference: sympy.Expr) -> bool:
        expanded = sympy.expand(difference.subs(more))
        if expanded.atoms(sympy.Function) or not expanded.is_polynomial():
            return False
        return all(number >= 0 for number in expanded.as_coefficients_dict().values())

    for extreme in expression.atoms(Min, Max):
        sign = 1 if isinstance(extreme, Min) else -1
        for operand in extreme.args:
            others = [other for other in extreme.args if other is not operand]
            if all(is_never_negative(sign * (other - operand)) for other in others):
                expression = expression.subs(extreme, operand)
                break
    return expression


def _simple(relation: sympy.Rel, decision: Decision, names: Mapping[str, str]) -> Limit | None:
    """`a*size + b` compared with 0, or a multiple; None for anything else."""
    if len(relation.free_symbols) != 1:
        return None
    (symbol,) = relation.free_symbols
    name, difference = names[str(symbol)], relation.lhs
    if isinstance(relation, sympy.Eq) and isinstance(difference, Mod):
        value, factor = difference.args
        if value == symbol and isinstance(factor, sympy.Integer):
            return _limit(name, "%", int(factor), decision)
        return None
    difference = sympy.expand(difference)
    if difference.atoms(sympy.Function) or not difference.is_polynomial(symbol):
        return None
    polynomial = sympy.Poly(difference, symbol)
    if polynomial.degree() != 1:
        return None
    slope, offset = (int(c) for c in polynomial.all_coeffs())
    bound = sympy.Rational(-offset, slope)
    if isinstance(relation, (sympy.Eq, sympy.Ne)):
        if not bound.is_Integer:
            return None
        return _limit(name, "==" if isinstance(relation, sympy.Eq) else "!=", int(bound), decision)
    is_strict = isinstance(relation, (sympy.StrictLessThan, sympy.StrictGreaterThan))
    is_upper = isinstance(relation, (sympy.LessThan, sympy.StrictLessThan)) == (slope > 0)
    shift = int(is_strict and bool(bound.is_Integer))
    if is_upper:
        return _limit(name, "<=", math.floor(bound) - shift, decision)
    return _limit(name, ">=", math.ceil(bound) + shift, decision)


def _smallest(relation: sympy.Rel, decision: Decision, names: Mapping[str, str]) -> Limit | None:
    """`size >= number` for a relation of one size that holds from a number on: proven above the
    constants in it, tried below."""
    if len(relation.free_symbols) != 1:
        return None
    (symbol,) = relation.free_symbols
    edge = 2 * sum(abs(int(number)) for number in relation.atoms(sympy.Integer)) + 2
    if edge > _SAMPLES or not _is_true(relation, {symbol: _multiple_from(edge, 1, symbol)}):
        return None
    failing = [size for size in range(2, edge) if not _at(relation, str(symbol), size)]
    if failing != list(range(2, 2 + len(failing))):
        return None
    return _limit(names[str(symbol)], ">=", 2 + len(failing), decision)


def _multiple_from(low: int, factor: int, symbol: sympy.Symbol) -> tuple[sympy.Expr, int, int]:
    """Any multiple of `factor` from `low` on: as an expression, its least value, its factor."""
    least = -(-low // factor)
    more = sympy.Symbol(f"more_{symbol}", integer=True, nonnegative=True)
    return factor * (least + more), factor * least, factor


def _is_true(
    relation: sympy.Rel, values: Mapping[sympy.Symbol, tuple[sympy.Expr, int, int]]
) -> bool:
    """True when the relation is proven for all these values."""
    # torch's functions of sizes may refuse what they cannot say; the relation is kept then.
    with contextlib.suppress(Exception):
        ranges = {symbol: ValueRanges(low, sympy.oo) for symbol, (_, low, _) in values.items()}
        if bound_sympy(relation, ranges).lower == sympy.true:
            return True
    with contextlib.suppress(Exception):
        put = {symbol: expression for symbol, (expression, _, _) in values.items()}
        replaced = relation.func(sympy.expand(relation.lhs.subs(put)), relation.rhs)
        return bool(replaced == sympy.true or sympy.simplify(replaced) == sympy.true)
    return False


def _limit(size: str, relation: Relation, number: int, decision: Decision) -> Limit:
    cause: Any = "branch" if decision.is_branch and not decision.is_assert else "op"
    return Limit(size, relation, number, cause, decision.source)


def _keep(kept: dict[tuple[Any, ...], Limit], limit: Limit) -> None:
    """The tightest bound of a size; excluded values and multiples beside each other; nothing that
    every size of at least 2 fulfils."""
    if limit.relation == ">=" and limit.size.isidentifier() and limit.number <= 2:
        return
    if limit.relation == "!=" and limit.size.isidentifier() and limit.number < 2:
        return
    key: Any = (limit.size, limit.relation)
    if limit.relation not in ("<=", ">="):
        key = (*key, limit.number)
    other = kept.get(key)
    if (
        other is None
        or (limit.relation == "<=" and limit.number < other.number)
        or (limit.relation == ">=" and limit.number > other.number)
    ):
        kept[key] = limit


def _multiples(rest: Iterable[tuple[sympy.Rel, Decision]], names: Mapping[str, str]) -> list[Limit]:
    """For each size: the factor that all its equations ask for, when they ask for one.

    The factor is found by trying sizes; what is not proven from it stays a limit of its own.
    """
    found = []
    for text, name in names.items():
        equations = [
            (relation, decision)
            for relation, decision in rest
            if isinstance(relation, sympy.Eq) and text in map(str, relation.free_symbols)
        ]
        if not equations:
            continue
        sizes = [
            size
            for size in range(2, _SAMPLES)
            if all(_at(relation, text, size) for relation, _ in equations)
        ]
        factor = math.gcd(*sizes) if sizes else 1
        if factor > 1 and sizes[0] <= 4 * factor and len(sizes) > 1:
            found.append(_limit(name, "%", factor, equations[0][1]))
    return found


def _at(relation: sympy.Rel, text: str, size: int) -> bool:
    """Whether it holds where the size is `size` and all others are 3."""
    values = {s: sympy.Integer(size if str(s) == text else 3) for s in relation.free_symbols}
    try:
        return bool(relation.xreplace(values) == sympy.true)
    except ZeroDivisionError:
        return False


def _general(relation: sympy.Rel, decision: Decision, names: Mapping[str, str]) -> Limit:
    """A limit of an expression. Raises CaptureError when it has no form in the graph text."""
    difference = sympy.expand(relation.lhs)
    constant, rest = difference.as_coeff_Add()
    if rest.could_extract_minus_sign():
        constant, rest, relation = -constant, -rest, relation.reversedsign
    number = int(-constant)
    kind: dict[type, tuple[Relation, int]] = {
        sympy.LessThan: ("<=", 0),
        sympy.StrictLessThan: ("<=", -1),
        sympy.GreaterThan: (">=", 0),
        sympy.StrictGreaterThan: (">=", 1),
        sympy.Equality: ("==", 0),
        sympy.Unequality: ("!=", 0),
    }
    word, shift = kind[relation.func]
    symbols = {s: sympy.Symbol(names[str(s)]) for s in rest.free_symbols}
    size = str(rest.xreplace(symbols)).replace("PythonMod(", "Mod(")
    if not is_size(size):
        raise CaptureError(
            f"the model needs {size} {word} {number + shift} at "
            f"{decision.source or 'an unknown line'}, which cannot be kept as a limit; fix one of "
            "the sizes by leaving it out of dynamic="
        )
    return _limit(size, word, number + shift, decision)


def _fails_at_one(condition: sympy.Basic, symbol: sympy.Symbol) -> bool:
    """True when `condition` can be false where the size is 1."""
    at_one = condition.xreplace({symbol: sympy.Integer(1)})
    if not at_one.free_symbols:
        return bool(at_one != sympy.true)
    known = {s: ValueRanges(1, sympy.oo) for s in at_one.free_symbols}
    if not isinstance(at_one, (sympy.Rel, Boolean)):
        return True
    # Where the condition holds for larger sizes by chance only, it has become a limit already.
    tried = (1, 2, 3, 5, 16, 100)
    return any(
        at_one.xreplace(dict.fromkeys(known, sympy.Integer(size))) != sympy.true
        and condition.xreplace(
            {**dict.fromkeys(known, sympy.Integer(size)), symbol: sympy.Integer(2)}
        )
        == sympy.true
        for size in tried
    )
