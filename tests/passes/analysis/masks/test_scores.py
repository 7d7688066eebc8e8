"""Scores taken apart: one case a form, on expressions alone."""

from __future__ import annotations

import math
from typing import Any

import pytest

from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks import scores
from graphopt.passes.analysis.masks.algebra import Expr
from graphopt.passes.analysis.masks.scores import SCORE, Factor, Scores, Unread
from graphopt.passes.analysis.masks.values import axis

Q, K = axis(2), axis(3)
S = ia.Read("product", (axis(0), axis(1), Q, K), "float")
DATA = ia.Read("data", (Q, K), "float")
ROW = ia.Read("row", (Q,), "float")
CAUSAL = ia.less_equal(K, Q)
LOW = -1e9


def call(op: str, *args: Expr | float) -> Expr:
    return ia.Call(op, tuple(a if not isinstance(a, (int, float)) else ia.real(a) for a in args))


def mul(x: Expr | float, y: Expr | float) -> Expr:
    return call("mul", x, y)


def add(x: Expr | float, y: Expr | float) -> Expr:
    return call("add", x, y)


def where(condition: Expr, x: Expr | float, y: Expr | float) -> Expr:
    made = (ia.real(v) if isinstance(v, (int, float)) else v for v in (x, y))
    return ia.choose(condition, *made)


INF = ia.real(-math.inf)
CAPPED = mul(call("tanh", mul(S, 0.5)), 4.0)
READ: dict[str, tuple[Expr, Scores]] = {
    "plain": (S, Scores(ia.TRUE, 1.0, 0.0, None, INF)),
    "scaled": (mul(mul(S, 0.5), 0.5), Scores(ia.TRUE, 0.25, 0.0, None, INF)),
    "scaled first": (mul(0.5, S), Scores(ia.TRUE, 0.5, 0.0, None, INF)),
    "divided": (call("div", S, 4.0), Scores(ia.TRUE, 0.25, 0.0, None, INF)),
    "capped": (CAPPED, Scores(ia.TRUE, 2.0, 4.0, None, INF)),
    "biased": (add(S, DATA), Scores(ia.TRUE, 1.0, 0.0, DATA, INF)),
    "less": (
        call("sub", S, DATA),
        Scores(ia.TRUE, 1.0, 0.0, mul(DATA, -1), INF),
    ),
    "biased twice": (add(add(S, DATA), ROW), Scores(ia.TRUE, 1.0, 0.0, add(DATA, ROW), INF)),
    "capped and biased": (add(CAPPED, DATA), Scores(ia.TRUE, 2.0, 4.0, DATA, INF)),
    "biased, then scaled": (
        mul(add(S, DATA), 0.5),
        Scores(ia.TRUE, 0.5, 0.0, mul(DATA, 0.5), INF),
    ),
    "filled": (where(CAUSAL, S, LOW), Scores(CAUSAL, 1.0, 0.0, None, ia.real(LOW))),
    "filled with nothing": (where(CAUSAL, S, -math.inf), Scores(CAUSAL, 1.0, 0.0, None, INF)),
    "added": (
        where(CAUSAL, S, add(S, LOW)),
        Scores(CAUSAL, 1.0, 0.0, None, add(SCORE, ia.real(LOW))),
    ),
    "added, scaled": (
        where(CAUSAL, mul(S, 0.5), add(mul(S, 0.5), LOW)),
        Scores(CAUSAL, 0.5, 0.0, None, add(SCORE, ia.real(LOW))),
    ),
    "added before the scale": (
        where(CAUSAL, mul(S, 0.5), add(S, LOW)),
        Scores(CAUSAL, 0.5, 0.0, None, add(mul(SCORE, 2.0), ia.real(LOW))),
    ),
    "added what swallows": (
        where(CAUSAL, S, -1e38),
        Scores(CAUSAL, 1.0, 0.0, None, ia.real(-1e38)),
    ),
    "biases in places": (
        where(CAUSAL, add(S, DATA), S),
        Scores(ia.TRUE, 1.0, 0.0, where(CAUSAL, DATA, 0.0), INF),
    ),
    "by a factor of each row": (
        mul(S, ROW),
        Scores(ia.TRUE, 1.0, 0.0, None, INF, Factor("mul", ROW)),
    ),
    "divided by one of each row": (
        call("div", mul(S, 0.5), ROW),
        Scores(ia.TRUE, 0.5, 0.0, None, INF, Factor("div", ROW)),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_what_scores_are_made_of(name: str) -> None:
    element, expected = READ[name]
    assert scores.read_scores(element, S) == expected


UNREAD: dict[str, tuple[Expr, str]] = {
    "nothing visible": (ia.real(-1e9), "nothing-visible"),
    "no product": (DATA, "not-scores"),
    "a number": (ia.real(1.0), "not-scores"),
    "scaled by nothing": (mul(S, 0.0), "not-scores"),
    "with itself": (mul(S, S), "not-scores"),
    "a number divided by it": (call("div", 1.0, S), "not-scores"),
    "divided by nothing": (call("div", S, 0.0), "not-scores"),
    "data divided by it": (call("div", DATA, S), "not-scores"),
    "taken from data": (call("sub", DATA, S), "not-scores"),
    "no factor behind tanh": (call("tanh", S), "not-scores"),
    "tanh of tanh": (call("tanh", CAPPED), "not-scores"),
    "tanh of a sum": (mul(call("tanh", add(S, DATA)), 2.0), "not-scores"),
    "tanh of scores of a factor": (mul(call("tanh", mul(S, ROW)), 2.0), "not-scores"),
    "a negative softcap": (mul(call("tanh", S), -2.0), "not-scores"),
    "a sum behind tanh": (mul(add(call("tanh", S), DATA), 2.0), "not-scores"),
    "scaled after the softcap": (mul(CAPPED, 2.0), "scale-after-softcap"),
    "two factors": (mul(mul(S, ROW), DATA), "not-scores"),
    "a factor behind a bias": (mul(add(S, DATA), ROW), "not-scores"),
    "another op": (call("log", S), "not-scores"),
    "filled with what hides nothing": (where(CAUSAL, S, -3.0), "masked-fill"),
    "scaled in places": (where(CAUSAL, S, mul(S, 2.0)), "not-scores"),
    "unread inside": (add(mul(S, S), 1.0), "not-scores"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read(name: str) -> None:
    element, code = UNREAD[name]
    found = scores.read_scores(element, S)
    assert isinstance(found, Unread)
    assert found.code == code


def test_what_hidden_scores_hold_when_it_cannot_be_said() -> None:
    """A softcap is no line: a score before it is nothing that the capped score tells."""
    element = where(CAUSAL, CAPPED, add(S, LOW))
    found = scores.read_scores(element, S)
    assert isinstance(found, Scores)
    assert found.hidden is None
    capped = where(CAUSAL, CAPPED, add(CAPPED, LOW))
    assert scores.read_scores(capped, S) == Scores(CAUSAL, 2.0, 4.0, None, add(SCORE, ia.real(LOW)))


@pytest.mark.parametrize(
    ("e", "is_hidden"),
    [
        (ia.real(-1e4), True),
        (ia.real(-9999.0), False),
        (ia.integer(-20000), False),
        (ia.FALSE, False),
        (add(S, -1e4), True),
        (add(-1e4, S), True),
        (call("sub", -1e4, S), True),
        (call("sub", S, -1e4), False),
        (mul(S, -1e4), False),
        (S, False),
    ],
)
def test_what_counts_as_hidden(e: Expr, is_hidden: bool) -> None:
    assert scores.shows_nothing(e) == is_hidden
    assert scores.shows_nothing(where(CAUSAL, e, e)) == is_hidden
    assert not scores.shows_nothing(where(CAUSAL, e, S))


@pytest.mark.parametrize(
    ("e", "is_negligible"),
    [
        (ia.real(-1e30), True),
        (ia.real(-1e29), False),
        (add(SCORE, ia.real(-1e30)), True),
        (add(SCORE, ia.real(-1e9)), False),
        (where(CAUSAL, -1e31, -math.inf), True),
        (where(CAUSAL, -1e31, -1e9), False),
        (call("sub", -1e31, DATA), True),
        (call("sub", DATA, -1e31), False),
        (mul(SCORE, -1e31), False),
        (SCORE, False),
    ],
)
def test_what_weighs_nothing(e: Expr, is_negligible: bool) -> None:
    assert scores.is_negligible(e) == is_negligible


@pytest.mark.parametrize(
    ("hidden", "dropped", "found"),
    [
        (ia.real(-1e9), ia.real(0), ia.real(-1e9)),
        (ia.real(-1e9), ROW, call("sub", -1e9, ROW)),
        (
            add(SCORE, ia.real(-1e9)),
            ROW,
            add(SCORE, call("sub", -1e9, ROW)),
        ),
        (add(DATA, SCORE), ROW, call("sub", add(DATA, SCORE), ROW)),
    ],
)
def test_a_bias_of_all_keys_is_taken_from_the_hidden(
    hidden: Expr, dropped: Expr, found: Expr
) -> None:
    assert scores.beside(hidden, dropped) == found


MASKS: dict[str, tuple[Expr, tuple[Any, ...]]] = {
    "a condition": (CAUSAL, (CAUSAL, None, INF)),
    "numbers": (where(CAUSAL, 0.0, LOW), (CAUSAL, ia.real(0.0), add(SCORE, ia.real(LOW)))),
    "nothing": (where(CAUSAL, 0.0, -math.inf), (CAUSAL, ia.real(0.0), INF)),
    "what swallows": (where(CAUSAL, 0.0, -1e38), (CAUSAL, ia.real(0.0), ia.real(-1e38))),
    "a bias": (DATA, (ia.TRUE, DATA, INF)),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_on_their_own(name: str) -> None:
    element, expected = MASKS[name]
    assert scores.read_additive(element) == expected


@pytest.mark.parametrize(
    ("e", "adds"),
    [
        (S, True),
        (where(CAUSAL, S, add(S, LOW)), True),
        (where(CAUSAL, S, LOW), False),
        (where(CAUSAL, S, -1e31), True),
        (where(CAUSAL, LOW, S), False),
    ],
)
def test_whether_all_that_hides_is_added(e: Expr, adds: bool) -> None:
    assert scores.adds(e) == adds
