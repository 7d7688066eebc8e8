"""Expressions as text: the language of the op computes of it what the expression is."""

from __future__ import annotations

import pytest
import torch
from algebra_values import Expressions, K, N, Q, evaluated
from torch import Tensor

from graphopt.ops import predicate as language
from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks import predicate_text
from graphopt.passes.analysis.masks.algebra import Expr, Var
from graphopt.passes.analysis.masks.predicate_text import UnwrittenError, text

SIZE = 7
TABLE = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]]).repeat(4, 1)[:SIZE]


def computed(written: str) -> Tensor:
    """On the grid of queries and keys."""
    aux = (TABLE, TABLE >= 5)
    sizes = (1, 1, SIZE, SIZE)
    found = language.evaluate(written, sizes, aux, range(SIZE), torch.device("cpu"))
    return found.expand(1, 1, SIZE, SIZE)[0, 0]


def _named(e: Expr) -> Expr:
    """Under the names that the language has."""
    if isinstance(e, ia.Read):
        indices = tuple(map(_named, e.indices))
        return ia.Read("aux1" if e.kind == "bool" else "aux0", indices, e.kind)
    if isinstance(e, Var):
        return {Q: Var("q"), K: Var("k")}.get(e, Var("T", size=True))
    if isinstance(e, ia.Sum):
        return ia.linear({_named(a): c for a, c in e.terms}, e.constant)
    return ia.rebuild(e.op, tuple(map(_named, e.args))) if isinstance(e, ia.Call) else e


@pytest.mark.parametrize("seed", range(40))
def test_random_expressions(seed: int) -> None:
    expressions = Expressions(seed, table=lambda row, column: int(TABLE[row, column]))
    for _ in range(40):
        made = expressions.step()
        written = text(_named(made.expr))
        wanted = [
            [evaluated(made.expr, {Q: q, K: k, N: SIZE}, expressions.table) for k in range(SIZE)]
            for q in range(SIZE)
        ]
        assert torch.equal(computed(written).long(), torch.tensor(wanted).long()), written


X, Y = ia.Call("float", (Q,)), ia.Call("float", (ia.add(K, ia.integer(1)),))
CALLS: dict[str, tuple[tuple[Expr, ...], str]] = {
    "add": ((X, Y), "float(q) + float(k + 1)"),
    "sub": ((X, Y), "float(q) - float(k + 1)"),
    "mul": ((X, Y), "float(q) * float(k + 1)"),
    "div": ((X, Y), "float(q) / float(k + 1)"),
    "lt": ((X, Y), "float(q) < float(k + 1)"),
    "le": ((X, Y), "float(q) <= float(k + 1)"),
    "gt": ((X, Y), "float(q) > float(k + 1)"),
    "ge": ((X, Y), "float(q) >= float(k + 1)"),
    "eq": ((X, Y), "float(q) == float(k + 1)"),
    "ne": ((X, Y), "float(q) != float(k + 1)"),
    "where": ((ia.less_equal(K, Q), X, Y), "where(k <= q, float(q), float(k + 1))"),
    "float": ((Q,), "float(q)"),
    "abs": ((X,), "abs(float(q))"),
    "min": ((X, Y), "min(float(q), float(k + 1))"),
    "max": ((X, Y), "max(float(q), float(k + 1))"),
    "bf16": ((X,), "bf16(float(q))"),
    "f16": ((X,), "f16(float(q))"),
}


@pytest.mark.parametrize(
    "op", dict.fromkeys((*predicate_text._INFIX, *predicate_text._FUNCTIONS, *CALLS))
)
def test_every_operation_that_has_a_text(op: str) -> None:
    assert op in predicate_text._INFIX or op in predicate_text._FUNCTIONS
    args, written = CALLS[op]
    made = text(_named(ia.Call(op, args)))
    assert made == written
    computed(made)


@pytest.mark.parametrize(
    ("e", "written"),
    [
        (ia.less_equal(K, Q), "k <= q"),
        (ia.less_equal(ia.add(Q, ia.integer(-5)), K), "q <= k + 5"),
        (ia.less_equal(ia.integer(3), Q), "3 <= q"),
        (ia.less_equal(Q, ia.integer(3)), "q <= 3"),
        (ia.equal(Q, K), "k == q"),
        (ia.negate(ia.equal(Q, K)), "not (k == q)"),
        (ia.times(Q, -2), "-2 * q"),
        (ia.add(ia.times(Q, -1), ia.integer(-4)), "-q - 4"),
        (ia.add(K, Q, -1), "k - q"),
        (ia.floor_divide(ia.add(Q, K), 4), "(k + q) // 4"),
        (ia.times(ia.floor_divide(Q, 4), 3), "3 * (q // 4)"),
        (ia.add(ia.floor_divide(Q, 4), K), "q // 4 + k"),
        (ia.magnitude(ia.add(Q, K, -1)), "abs(-k + q)"),
        (ia.times(ia.magnitude(ia.add(Q, K, -1)), -2), "-2 * abs(-k + q)"),
        (
            ia.Call("mul", (ia.Call("add", (X, Y)), ia.real(2))),
            "(float(q) + float(k + 1)) * 2.0",
        ),
        (ia.Call("sub", (X, ia.Call("sub", (X, Y)))), "float(q) - (float(q) - float(k + 1))"),
        (ia.real(float("-inf")), "-inf"),
        (ia.TRUE, "True"),
    ],
)
def test_brackets_and_signs(e: Expr, written: str) -> None:
    made = text(_named(e))
    assert made == written
    computed(made)


def test_junctions_inside_junctions_are_bracketed() -> None:
    a, b = ia.less_equal(K, Q), ia.equal(ia.Read("t", (Q, K), "int"), K)
    c = ia.Read("t", (K, Q), "bool")
    for junction in (ia.all_of(a, ia.any_of(b, c)), ia.any_of(a, ia.all_of(b, c))):
        made = text(_named(junction))
        outer, inner = (" and ", " or ") if junction.op == "and" else (" or ", " and ")  # type: ignore[union-attr]
        assert outer in made
        assert "(" + made.partition("(")[2].partition(")")[0] + ")" in made
        assert inner in made
        wanted = [
            [evaluated(junction, {Q: q, K: k}, lambda r, c: int(TABLE[r, c])) for k in range(SIZE)]
            for q in range(SIZE)
        ]
        assert torch.equal(computed(made), torch.tensor(wanted).bool())


@pytest.mark.parametrize(
    "e",
    [
        ia.Call("tanh", (X,)),
        ia.Call("log", (X,)),
        ia.Call("narrow", (X,)),
        ia.Call("int_mul", (Q, K)),
        ia.real(float("nan")),
        ia.Call("add", (X, ia.Call("tanh", (X,)))),
    ],
)
def test_what_has_no_text(e: Expr) -> None:
    with pytest.raises(UnwrittenError):
        text(e)


def test_rebuilt_conditions_keep_their_text() -> None:
    expressions = Expressions(5)
    for _ in range(30):
        made = expressions.step()
        assert text(ia.substitute(made.expr, {})) == text(made.expr)
