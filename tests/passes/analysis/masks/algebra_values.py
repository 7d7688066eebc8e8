"""Random expressions of the index algebra, each with the Python function that it should compute."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks.algebra import Expr, Var
from graphopt.passes.analysis.masks.values import axis

Q, K, N = axis(0), axis(1), Var("n", size=True)
_TABLE = ((3, 1, 4, 1, 5, 9, 2), (6, 5, 3, 5, 8, 9, 7))
Env = Mapping[Var, int]
Value = Callable[[Env], int]
Table = Callable[[int, int], int]


def element(row: int, column: int) -> int:
    """Of the tensor that the expressions read."""
    return _TABLE[row % 2][column % 7]


@dataclass(frozen=True)
class Both:
    """An expression and what it should compute."""

    expr: Expr
    value: Value


def evaluated(e: Expr, at: Env, table: Table = element) -> int:
    """An expression, by the meaning of its parts alone."""
    if isinstance(e, ia.Num):
        return int(e.value) if e.kind != "float" else e.value  # type: ignore[return-value]
    if isinstance(e, Var):
        return at[e]
    if isinstance(e, ia.Sum):
        return e.constant + sum(c * evaluated(a, at, table) for a, c in e.terms)
    if isinstance(e, ia.Read):
        row, column = (evaluated(i, at, table) for i in e.indices)
        found = table(row, column)
        return found >= 5 if e.kind == "bool" else found
    args = [evaluated(a, at, table) for a in e.args]
    operations: dict[str, Callable[..., int]] = {
        "ge0": lambda x: x >= 0,
        "eq0": lambda x: x == 0,
        "same": lambda x, y: bool(x) == bool(y),
        "not": lambda x: not x,
        "and": lambda *xs: all(xs),
        "or": lambda *xs: any(xs),
        "where": lambda c, x, y: x if c else y,
        "floordiv": lambda x, y: x // y,
        "magnitude": abs,
    }
    return operations[e.op](*args)


class Expressions:
    """Random integers and conditions."""

    def __init__(self, seed: int, table: Table = element) -> None:
        self.choose, self.table = random.Random(seed), table
        self.integers = [
            *(Both(v, lambda at, v=v: at[v]) for v in (Q, K, N)),
            *(Both(ia.integer(n), lambda at, n=n: n) for n in (-2, 0, 1, 3)),
            Both(ia.Read("t", (Q, K), "int"), lambda at: table(at[Q], at[K])),
        ]
        self.conditions = [
            Both(ia.TRUE, lambda at: True),
            Both(ia.FALSE, lambda at: False),
            Both(ia.less_equal(K, Q), lambda at: at[K] <= at[Q]),
            Both(ia.Read("t", (K, Q), "bool"), lambda at: table(at[K], at[Q]) >= 5),
        ]
        self.trees: list[Both] = []

    def step(self) -> Both:
        """One more, kept."""
        kind = self.choose.randrange(3)
        if kind == 0:
            made = self.integer()
            self.integers.append(made)
        elif kind == 1:
            made = self.condition()
            self.conditions.append(made)
        else:
            made = self.tree()
            self.trees.append(made)
        return made

    def integer(self) -> Both:
        x, y = (self.choose.choice(self.integers) for _ in range(2))
        k, n = self.choose.randrange(-3, 4), self.choose.randrange(1, 5)
        return self.choose.choice(
            [
                Both(ia.add(x.expr, y.expr, k), lambda at: x.value(at) + k * y.value(at)),
                Both(ia.times(x.expr, k), lambda at: x.value(at) * k),
                Both(ia.floor_divide(x.expr, n), lambda at: x.value(at) // n),
                Both(ia.remainder(x.expr, n), lambda at: x.value(at) % n),
                Both(ia.magnitude(x.expr), lambda at: abs(x.value(at))),
            ]
        )

    def condition(self) -> Both:
        x, y = (self.choose.choice(self.integers) for _ in range(2))
        c, d, e = (self.choose.choice(self.conditions) for _ in range(3))
        return self.choose.choice(
            [
                Both(ia.at_least_zero(x.expr), lambda at: x.value(at) >= 0),
                Both(ia.less_equal(x.expr, y.expr), lambda at: x.value(at) <= y.value(at)),
                Both(ia.equal(x.expr, y.expr), lambda at: x.value(at) == y.value(at)),
                Both(ia.equal(c.expr, d.expr), lambda at: bool(c.value(at)) == bool(d.value(at))),
                Both(ia.negate(c.expr), lambda at: not c.value(at)),
                Both(
                    ia.all_of(c.expr, d.expr, e.expr),
                    lambda at: c.value(at) and d.value(at) and e.value(at),
                ),
                Both(
                    ia.any_of(c.expr, d.expr, e.expr),
                    lambda at: c.value(at) or d.value(at) or e.value(at),
                ),
                Both(
                    ia.choose(c.expr, d.expr, e.expr),
                    lambda at: d.value(at) if c.value(at) else e.value(at),
                ),
            ]
        )

    def tree(self) -> Both:
        c = self.choose.choice(self.conditions)
        x, y = (self.choose.choice([*self.trees, *self.integers]) for _ in range(2))
        return Both(
            ia.choose(c.expr, x.expr, y.expr),
            lambda at: x.value(at) if c.value(at) else y.value(at),
        )
