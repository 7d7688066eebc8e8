"""The index algebra on grids: random masks, their texts, and what its constructors promise."""

from __future__ import annotations

import random

import pytest
import torch
from mask_graphs import MaskGraph
from torch import fx

from graphopt.ops import predicate as language
from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks.algebra import Expr, Var
from graphopt.passes.analysis.masks.constants import read_constant
from graphopt.passes.analysis.masks.predicate_text import UnwrittenError, text
from graphopt.passes.analysis.masks.reshapes import bounded, limits
from graphopt.passes.analysis.masks.values import axis

aten = torch.ops.aten
ROWS, COLUMNS = 6, 8
INTEGER = ("add", "sub", "rsub", "floor_divide", "remainder", "abs", "neg", "mul")
BOOLEAN = ("bitwise_and", "bitwise_or", "bitwise_xor", "logical_or", "eq", "ne")
COMPARED = ("lt", "le", "gt", "ge", "eq", "ne")


class Random(MaskGraph):
    """A random mask over `[ROWS, COLUMNS]`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        j = self.call(aten.arange.default, COLUMNS)
        i = self.call(aten.unsqueeze.default, self.call(aten.arange.default, ROWS), 1)
        self.integers = [i, j]
        self.booleans = [self.call(aten.le.Tensor, j, i)]
        self.floats = [self.call(aten.full.default, [ROWS, COLUMNS], 0.5)]

    def step(self) -> None:
        """One more op on what is there."""
        pick, number = self.random.choice, self.random.randint
        kind = pick(("integer", "compared", "boolean", "float", "moved", "moved"))
        if kind == "integer":
            name, x = pick(INTEGER), pick(self.integers)
            if name in ("abs", "neg"):
                self.integers.append(self.call(getattr(aten, name).default, x))
            elif name in ("floor_divide", "mul", "remainder"):
                op = getattr(aten, name)
                scalar = op.default if name == "floor_divide" else op.Scalar
                self.integers.append(self.call(scalar, x, number(1, 4)))
            else:
                other = pick([*self.integers, number(-3, 3)])
                op = getattr(aten, name)
                is_node = isinstance(other, fx.Node)
                self.integers.append(self.call(op.Tensor if is_node else op.Scalar, x, other))
        elif kind == "compared":
            x, other = pick(self.integers), pick([*self.integers, number(-2, 9)])
            op = getattr(aten, pick(COMPARED))
            is_node = isinstance(other, fx.Node)
            self.booleans.append(self.call(op.Tensor if is_node else op.Scalar, x, other))
        elif kind == "boolean":
            op = getattr(aten, pick(BOOLEAN))
            op = op.default if "logical" in str(op) else op.Tensor
            self.booleans.append(self.call(op, pick(self.booleans), pick(self.booleans)))
        elif kind == "float":
            condition, value = pick(self.booleans), pick((0.0, 1.0, -1e9, float("-inf")))
            self.floats.append(
                self.call(aten.masked_fill.Scalar, pick(self.floats), condition, value)
            )
        else:
            self.moved()

    def moved(self) -> None:
        """A view there and another one back."""
        pool = self.random.choice((self.integers, self.booleans, self.floats))
        x = self.random.choice(pool)
        shape = list(self.values[x].shape)
        if shape != [ROWS, COLUMNS]:
            x = self.call(aten.expand.default, x, [ROWS, COLUMNS])
        how = self.random.randrange(4)
        if how == 0:
            flat = self.call(aten.view.default, self.call(aten.clone.default, x), [ROWS * COLUMNS])
            x = self.call(aten.view.default, flat, [2, ROWS // 2, COLUMNS])
            x = self.call(aten.view.default, x, [ROWS, COLUMNS])
        elif how == 1:
            x = self.call(aten.flip.default, x, [self.random.randrange(2)])
        elif how == 2:
            cut = self.call(aten.slice.Tensor, x, 1, 0, 3)
            x = self.call(aten.cat.default, [self.call(aten.slice.Tensor, x, 1, 3), cut], 1)
        elif self.values[x].dtype == torch.bool:
            x = self.call(aten.triu.default, x, self.random.randint(-2, 2))
        pool.append(x)


@pytest.mark.parametrize("seed", range(40))
def test_random_masks_are_read_as_torch_computes_them(seed: int) -> None:
    graph = Random(seed)
    for _ in range(14):
        graph.step()
    for node in (*graph.integers, *graph.booleans, *graph.floats):
        graph.assert_read(node, opaque=True)
        element = graph.read_over(node, (ROWS, COLUMNS))
        # Rebuilding an expression from its parts gives it again.
        assert ia.substitute(element, {}) == element
        at = {axis(0): ia.add(axis(0), ia.integer(1)), axis(1): ia.integer(2)}
        moved = graph.computed(ia.substitute(element, at), (ROWS - 1, 1))
        wanted = graph.values[node].expand(ROWS, COLUMNS)[1:, 2:3]
        assert torch.equal(moved.double(), wanted.double())
        _assert_text(graph, node, element)


def _assert_text(graph: MaskGraph, node: fx.Node, element: Expr) -> None:
    """The text in the op's own language, where it has one, computes the same."""
    named: dict[Var, Expr] = {axis(0): Var("q"), axis(1): Var("k")}
    try:
        written = text(ia.substitute(element, named))
    except UnwrittenError:
        return
    # As many queries as keys, so that a query's position is its row.
    sizes = (1, 1, COLUMNS, COLUMNS)
    if any(f"{tensor.name}[" in written for tensor in graph.values):
        return
    found = language.evaluate(written, sizes, (), range(ROWS), torch.device("cpu"))
    wanted = graph.values[node].double().expand(ROWS, COLUMNS)
    assert torch.equal(found.double().expand(1, 1, ROWS, COLUMNS)[0, 0], wanted), written


ROW, COLUMN, SIZE = axis(0), axis(1), Var("n", size=True)
LINEAR = ia.add(ia.times(ROW, 4), ia.add(COLUMN, ia.integer(5)))


@pytest.mark.parametrize(
    ("op", "args", "expected"),
    [
        ("floordiv", (LINEAR, ia.integer(4)), ia.floor_divide(LINEAR, 4)),
        ("magnitude", (ia.times(COLUMN, -1),), ia.magnitude(COLUMN)),
        (
            "ge0",
            (ia.add(ia.times(COLUMN, 2), ia.integer(3)),),
            ia.at_least_zero(ia.add(COLUMN, ia.integer(1))),
        ),
        ("eq0", (ia.times(ia.add(ROW, COLUMN, -1), -1),), ia.equal(COLUMN, ROW)),
        ("not", (ia.less_equal(COLUMN, ROW),), ia.less_equal(ia.add(ROW, ia.integer(1)), COLUMN)),
        ("and", (ia.less_equal(COLUMN, ROW), ia.TRUE), ia.less_equal(COLUMN, ROW)),
        ("or", (ia.less_equal(COLUMN, ROW), ia.FALSE), ia.less_equal(COLUMN, ROW)),
        ("where", (ia.TRUE, ia.real(1), ia.real(2)), ia.real(1)),
        (
            "same",
            (ia.less_equal(COLUMN, ROW), ia.FALSE),
            ia.less_equal(ia.add(ROW, ia.integer(1)), COLUMN),
        ),
    ],
)
def test_rebuilding_goes_through_the_constructors(
    op: str, args: tuple[Expr, ...], expected: Expr
) -> None:
    assert ia.rebuild(op, args) == expected


def test_terms_that_a_divisor_divides_stand_outside() -> None:
    rest = ia.floor_divide(ia.add(COLUMN, ia.integer(1)), 4)
    assert ia.floor_divide(LINEAR, 4) == ia.add(ia.add(ROW, rest), ia.integer(1))
    assert ia.remainder(ia.times(ROW, 8), 4) == ia.integer(0)
    for value in range(-9, 9):
        assert ia.floor_divide(ia.integer(value), 4) == ia.integer(value // 4)


def test_folded_axes_come_apart_again() -> None:
    folded = ia.add(ia.times(ROW, 3), COLUMN)
    grid = limits((SIZE, ia.integer(3)))
    assert bounded(ia.floor_divide(folded, 3), grid) == ROW
    assert bounded(ia.remainder(folded, 3), grid) == COLUMN
    # One element more, and the second axis runs over.
    wide = limits((SIZE, ia.integer(4)))
    assert bounded(ia.floor_divide(folded, 3), wide) != ROW


def _value(element: Expr, shape: tuple[int, ...]) -> torch.Tensor:
    return MaskGraph().computed(element, shape)


BAND = torch.ones(9, 9).tril(2).triu(-3)
CONSTANTS = {
    "one number": torch.tensor([2.5]),
    "no axes": torch.tensor(3),
    "a table of one number": torch.full((4, 5), -1e9),
    "positions": torch.arange(12)[None],
    "positions in floats": torch.arange(3.0, 40.0, 3.0),
    "causal": torch.ones(7, 7, dtype=torch.bool).tril()[None, None],
    "bytes": torch.ones(7, 7, dtype=torch.uint8).tril(),
    "minus infinity above": torch.full((6, 6), float("-inf")).triu(1),
    "shifted": torch.ones(6, 6).tril(-2),
    "a band": BAND,
    "a band of booleans": BAND.bool(),
    "more columns than rows": torch.ones(4, 9).tril(3),
    "more rows than columns": torch.ones(9, 4).triu(-2),
    "the diagonal": torch.eye(5),
    "a global and a local side": torch.ones(8, 8).tril() + torch.ones(8, 8).tril(-4),
}
UNKNOWN = {
    "not quite causal": torch.ones(7, 7).tril() - torch.eye(7)[3:4],
    "nan": torch.tensor([float("nan")]),
    "weights": torch.randn(6, 6),
    "a vector of zeros": torch.zeros(4),
    "half steps": torch.arange(0, 4, 0.5),
    "one step too long": torch.tensor([0, 1, 2, 3, 5]),
    "a checkerboard": (torch.arange(8)[:, None] + torch.arange(8)) % 2,
    "two tables": torch.ones(2, 5, 5).tril() * torch.tensor([1.0, 2.0])[:, None, None],
    "no data": torch.ones(5, 5, device="meta"),
    "empty": torch.ones(0, 5),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_read(name: str) -> None:
    data = CONSTANTS[name]
    element = read_constant(data)
    assert element is not None
    assert not ia.reads(element)
    assert torch.equal(_value(element, tuple(data.shape)).double(), data.double())


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_constants_are_left_alone(name: str) -> None:
    assert read_constant(UNKNOWN[name]) is None
