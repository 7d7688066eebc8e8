"""The constructors of the algebra compute what they say: random expressions against plain integers.

Every expression is built twice, by the constructors and as a Python function of the variables, and
both are evaluated at random places. What is proven (bounds, truths, equal forms) holds there too.
"""

from __future__ import annotations

import itertools
import random

import pytest
from algebra_values import Both, Env, Expressions, K, N, Q, evaluated

from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks.algebra import Expr, Var
from graphopt.passes.analysis.masks.reshapes import bounded
from graphopt.passes.analysis.masks.values import axis


def places(choose: random.Random, count: int = 30) -> list[Env]:
    """Indices are >= 0, sizes >= 1."""
    return [
        {Q: choose.randrange(7), K: choose.randrange(7), N: choose.randrange(1, 9)}
        for _ in range(count)
    ]


def drawn(seed: int, count: int = 40) -> list[Both]:
    """Everything that some random steps make."""
    expressions = Expressions(seed)
    return [expressions.step() for _ in range(count)]


SEEDS = range(40)


@pytest.mark.parametrize("seed", SEEDS)
def test_constructors_compute_what_they_say(seed: int) -> None:
    choose = random.Random(seed)
    for both in drawn(seed):
        for at in places(choose):
            assert evaluated(both.expr, at) == both.value(at), (both.expr, at)


@pytest.mark.parametrize("seed", SEEDS)
def test_rebuilding_gives_the_same_form(seed: int) -> None:
    for both in drawn(seed):
        assert ia.substitute(both.expr, {}) == both.expr
        if isinstance(both.expr, ia.Call):
            assert ia.rebuild(both.expr.op, both.expr.args) == both.expr


@pytest.mark.parametrize("seed", SEEDS)
def test_substitution_is_evaluation_elsewhere(seed: int) -> None:
    choose = random.Random(seed)
    for both in drawn(seed, 20):
        moved = ia.substitute(both.expr, {Q: ia.add(K, N), K: ia.integer(2)})
        assert K not in ia.variables(moved) or Q in ia.variables(both.expr)
        for at in places(choose, 10):
            there = {**at, Q: at[K] + at[N], K: 2}
            assert evaluated(moved, at) == both.value(there)


@pytest.mark.parametrize("seed", SEEDS)
def test_bounds_hold(seed: int) -> None:
    choose = random.Random(seed)
    limits = {Q: ia.integer(6), K: ia.add(N, ia.integer(-1))}
    for both in drawn(seed):
        if ia.kind_of(both.expr) != "int" or (
            isinstance(both.expr, ia.Call) and both.expr.op == "where"
        ):
            continue
        low, low_within = ia.smallest(both.expr, {}), ia.smallest(both.expr, limits)
        simple = bounded(both.expr, limits)
        for at in places(choose):
            assert low is None or both.value(at) >= low
            if at[K] < at[N]:
                assert low_within is None or both.value(at) >= low_within
                assert evaluated(simple, at) == both.value(at)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_order_of_operands_makes_no_difference(seed: int) -> None:
    choose = random.Random(seed)
    made = [b for b in drawn(seed) if ia.kind_of(b.expr) == "bool"]
    for _ in range(10):
        parts = [choose.choice(made).expr for _ in range(3)]
        for junction in (ia.all_of, ia.any_of):
            forms = {junction(*order) for order in itertools.permutations(parts)}
            forms |= {junction(parts[0], parts[1], *parts), junction(junction(*parts))}
            assert len(forms) == 1, forms
        assert ia.equal(parts[0], parts[1]) == ia.equal(parts[1], parts[0])
        assert ia.negate(ia.negate(parts[0])) == parts[0]
        assert ia.conjuncts(ia.all_of(*parts)) == ia.conjuncts(ia.all_of(*reversed(parts)))


@pytest.mark.parametrize("seed", SEEDS)
def test_what_an_expression_depends_on(seed: int) -> None:
    """Variables that are not listed change nothing, nor do elements that are not read."""
    choose = random.Random(seed)
    for both in drawn(seed, 25):
        names = ia.variables(both.expr)
        assert names <= {Q, K}
        for at in places(choose, 6):
            for variable in {Q, K} - names:
                assert evaluated(both.expr, {**at, variable: at[variable] + 1}) == both.value(at)
        has_read = "Read(" in repr(both.expr)
        assert bool(ia.reads(both.expr)) == has_read


LE = ia.less_equal


def causal(by: int) -> Expr:
    """K <= Q + by"""
    return LE(K, ia.add(Q, ia.integer(by)))


@pytest.mark.parametrize(
    ("made", "form"),
    [
        # Of two bounds on one sum the deciding one stays.
        (ia.all_of(causal(0), causal(2)), causal(0)),
        (ia.any_of(causal(0), causal(2)), causal(2)),
        # What excludes each other, and what covers everything.
        (ia.all_of(causal(0), LE(ia.add(Q, ia.integer(1)), K)), ia.FALSE),
        (ia.any_of(causal(0), LE(ia.add(Q, ia.integer(1)), K)), ia.TRUE),
        (ia.any_of(causal(0), LE(ia.add(Q, ia.integer(2)), K)) == ia.TRUE, False),
        (ia.all_of(causal(0), LE(Q, K)) == ia.FALSE, False),
        # Absorption.
        (ia.all_of(causal(0), ia.any_of(causal(0), LE(N, K))), causal(0)),
        (ia.any_of(causal(0), ia.all_of(causal(0), LE(N, K))), causal(0)),
        # Common factors, rounded to the inside.
        (ia.at_least_zero(ia.add(ia.times(Q, 3), ia.integer(5))), ia.TRUE),
        (
            LE(ia.times(K, 2), ia.add(ia.times(Q, 2), ia.integer(3))),
            causal(1),
        ),
        (LE(ia.times(K, 2), ia.add(ia.times(Q, 2), ia.integer(-3))), causal(-2)),
        # Signs that are known: indices from 0, sizes from 1.
        (LE(ia.integer(0), Q), ia.TRUE),
        (LE(ia.integer(1), N), ia.TRUE),
        (LE(ia.integer(2), N) == ia.TRUE, False),
        (LE(Q, ia.integer(-1)), ia.FALSE),
        (LE(N, ia.integer(0)), ia.FALSE),
        (LE(Q, ia.integer(0)) == ia.FALSE, False),
        (LE(ia.integer(0), ia.floor_divide(ia.add(Q, K), 4)), ia.TRUE),
        (LE(ia.integer(1), ia.floor_divide(ia.add(Q, ia.integer(4)), 4)), ia.TRUE),
        # |x| against numbers is two half-lines.
        (
            LE(ia.magnitude(ia.add(Q, K, -1)), ia.integer(2)),
            ia.all_of(causal(2), LE(Q, ia.add(K, ia.integer(2)))),
        ),
        (
            LE(ia.integer(2), ia.magnitude(ia.add(K, Q, -1))),
            ia.any_of(LE(ia.add(Q, ia.integer(2)), K), LE(ia.add(K, ia.integer(2)), Q)),
        ),
        (ia.magnitude(ia.add(Q, K, -1)), ia.magnitude(ia.add(K, Q, -1))),
        (ia.magnitude(ia.integer(-3)), ia.integer(3)),
        # Equality: of integers from both sides, of booleans with constants.
        (ia.equal(Q, K), ia.equal(K, Q)),
        (ia.equal(ia.add(Q, ia.integer(2)), ia.add(K, ia.integer(2))), ia.equal(Q, K)),
        (ia.equal(ia.add(Q, ia.integer(2)), Q), ia.FALSE),
        (ia.equal(causal(0), ia.TRUE), causal(0)),
        (ia.equal(ia.FALSE, causal(0)), ia.negate(causal(0))),
        # Divisions.
        (ia.floor_divide(ia.add(ia.times(Q, 4), ia.integer(7)), 4), ia.add(Q, ia.integer(1))),
        (ia.remainder(ia.add(ia.times(Q, 4), ia.integer(7)), 4), ia.integer(3)),
        (ia.floor_divide(Q, 1), Q),
        # Choices.
        (ia.choose(ia.TRUE, Q, K), Q),
        (ia.choose(ia.FALSE, Q, K), K),
        (ia.choose(causal(0), Q, Q), Q),
        (ia.choose(causal(0), ia.TRUE, ia.FALSE), causal(0)),
        (ia.choose(causal(0), ia.FALSE, ia.TRUE), ia.negate(causal(0))),
        # Junctions of nothing, and of one.
        (ia.all_of(), ia.TRUE),
        (ia.any_of(), ia.FALSE),
        (ia.all_of(causal(0)), causal(0)),
        (ia.conjuncts(ia.TRUE), ()),
        (ia.conjuncts(causal(0)), (causal(0),)),
        (ia.conjuncts(ia.any_of(causal(0), LE(N, K))), (ia.any_of(causal(0), LE(N, K)),)),
    ],
)
def test_one_meaning_has_one_form(made: object, form: object) -> None:
    assert made == form


def test_a_size_that_is_computed_may_be_anything() -> None:
    assert ia.smallest(Var("n", size=True), {}) == 1
    assert ia.smallest(Var("n//2", size=True), {}) is None
    assert ia.smallest(axis(0), {}) == 0
    assert ia.smallest(ia.times(axis(0), -1), {}) is None
    assert ia.smallest(ia.times(axis(0), -1), {axis(0): ia.integer(6)}) == -6
    assert ia.smallest(ia.floor_divide(ia.add(Q, ia.integer(-3)), 2), {}) == -2
    assert ia.smallest(ia.Read("t", (), "int"), {}) is None


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        *((op, "bool") for op in ("ge0", "eq0", "same", "not", "and", "or")),
        *((op, "bool") for op in ("lt", "le", "gt", "ge", "eq", "ne")),
        *((op, "int") for op in ("floordiv", "magnitude", "int_mul", "int_min", "int_max")),
        *((op, "float") for op in ("add", "tanh", "float", "abs")),
    ],
)
def test_kinds_of_operations(op: str, kind: str) -> None:
    assert ia.kind_of(ia.Call(op, (Q, K))) == kind
    assert (op in ia._BOOLEAN) == (kind == "bool")
    assert (op in ia._INTEGER) == (kind == "int")
    assert ia.kind_of(ia.choose(causal(0), ia.Call(op, (Q, K)), ia.Call(op, (K, Q)))) == kind


def test_every_operation_with_a_kind_has_a_case() -> None:
    assert len(ia._BOOLEAN) == 12
    assert len(ia._INTEGER) == 5


def test_a_number_of_its_own_kind() -> None:
    assert ia.number(True) == ia.TRUE
    assert ia.number(1) == ia.integer(1)
    assert ia.number(1.0) == ia.real(1)
    assert ia.integer(1) != ia.TRUE
    with pytest.raises(TypeError, match="compare"):
        bool(ia.integer(1))
