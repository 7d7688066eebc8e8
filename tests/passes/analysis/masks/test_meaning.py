"""What a condition and a bias mean: one case an argument of the op, and every pair of bounds."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from mask_graphs import MaskGraph
from torch import Tensor, fx

from graphopt.ops.attention import Masks
from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks.algebra import Expr
from graphopt.passes.analysis.masks.meaning import (
    Hidden,
    MaskMeaning,
    Unproven,
    read_meaning,
    reader,
)
from graphopt.passes.analysis.masks.scores import SCORE
from graphopt.passes.analysis.masks.values import axis

aten = torch.ops.aten
B, H, S, T = 2, 3, 5, 7
Q, K = axis(2), axis(3)
INF = ia.real(-math.inf)


class Graph(MaskGraph):
    """Small tensors to be read: `[B, T]`, `[B, 1, 1, T]`, `[H]`, `[B, 1, S, T]`."""

    def __init__(self, queries: int = S) -> None:
        super().__init__()
        bits = torch.ones(B, T, dtype=torch.bool)
        self.pad = self.input("pad", bits)
        self.wide = self.input("wide", bits.view(B, 1, 1, T))
        self.hides = self.input("hides", bits)
        self.slopes = self.weight("slopes", torch.rand(H))
        self.segments = self.input("segments", torch.ones(B, T, dtype=torch.int64))
        self.dense = self.input("dense", torch.ones(B, 1, queries, T, dtype=torch.bool))
        self.added = self.input("added", torch.randn(B, 1, queries, T))
        self.table = self.input("table", torch.randn(B, H, queries, T))
        self.queries = queries

    def of(self, node: fx.Node, *at: Expr) -> Expr:
        """An element."""
        value = self.values[node]
        kind = (
            "bool" if value.dtype == torch.bool else "float" if value.is_floating_point() else "int"
        )
        return ia.Read(node.name, at, kind)

    def meaning(
        self, visible: Expr, bias: Expr | None = None, **hidden: Any
    ) -> MaskMeaning | Unproven:
        values = reader(self.graph)
        for node in list(self.values):
            values.of(node)
        sizes = tuple(map(ia.integer, (B, H, self.queries, T)))
        given = Hidden(**{"score": INF, "is_safe": True, **hidden})
        return read_meaning(values, visible, bias, given, sizes)


def visible_of(meaning: MaskMeaning, queries: int) -> Tensor:
    """What the op shows of these arguments."""
    masks = Masks(
        (B, H, queries, T),
        None,
        None,
        (),
        meaning.causal,
        meaning.window,
        meaning.predicate,
        "",
        "",
    )
    shown = masks.applied(torch.zeros(B, H, queries, T), range(queries))
    return shown[0, 0] == 0


def bound(low: int | None, high: int | None, gap: int) -> Expr:
    """low <= key - position <= high"""
    distance = ia.add(ia.add(K, Q, -1), ia.integer(-gap))
    parts = []
    if low is not None:
        parts.append(ia.at_least_zero(ia.add(distance, ia.integer(-low))))
    if high is not None:
        parts.append(ia.at_least_zero(ia.add(ia.times(distance, -1), ia.integer(high))))
    return ia.all_of(*parts)


BOUNDS = (None, -3, -2, -1, 0, 1, 2, 3)


@pytest.mark.parametrize("queries", [T, S])
def test_every_band_along_the_diagonal(queries: int) -> None:
    """Causal, windows, two-sided ones: as attributes where they are, as a predicate otherwise."""
    graph, gap = Graph(queries), T - queries
    far = torch.arange(T) - (torch.arange(queries) + gap)[:, None]
    for low, high in itertools.product(BOUNDS, BOUNDS):
        condition = bound(low, high, gap)
        if condition == ia.FALSE:
            continue
        found = graph.meaning(condition)
        assert isinstance(found, MaskMeaning)
        wanted = torch.ones(queries, T, dtype=torch.bool)
        wanted &= far >= (-99 if low is None else low)
        wanted &= far <= (99 if high is None else high)
        assert torch.equal(visible_of(found, queries), wanted), (low, high, found)
        assert found.mask is None
        is_causal = high == 0
        is_window = low is not None and low <= 0 and (is_causal or low == -(high or 0))
        assert found.causal == is_causal, (low, high, found)
        assert (found.window > 0) == bool(is_window and (is_causal or high)), (low, high, found)


def test_a_bound_that_always_holds_is_none() -> None:
    graph = Graph()
    far = ia.at_least_zero(ia.add(ia.add(Q, K, -1), ia.integer(T)))
    assert graph.meaning(far) == MaskMeaning()
    assert graph.meaning(ia.TRUE) == MaskMeaning()


def test_functions_of_batch_and_key_are_padding() -> None:
    graph = Graph()
    batch = axis(0)
    found = graph.meaning(graph.of(graph.pad, batch, K))
    assert isinstance(found, MaskMeaning)
    assert (found.padding, found.hiding) == ((graph.pad,), ())
    zero = ia.integer(0)
    found = graph.meaning(graph.of(graph.wide, batch, zero, zero, K))
    assert isinstance(found, MaskMeaning)
    assert found.padding == (graph.wide,)
    both = ia.all_of(
        graph.of(graph.pad, batch, K), ia.negate(graph.of(graph.hides, batch, K)), bound(None, 0, 2)
    )
    found = graph.meaning(both)
    assert isinstance(found, MaskMeaning)
    assert (found.padding, found.hiding, found.causal) == ((graph.pad,), (graph.hides,), True)
    assert found.predicate == ""


def test_other_conditions_of_small_tensors_are_predicates() -> None:
    graph, batch = Graph(), axis(0)
    same = ia.equal(
        graph.of(graph.segments, batch, K),
        graph.of(graph.segments, batch, ia.add(Q, ia.integer(T - S))),
    )
    found = graph.meaning(ia.all_of(same, bound(None, 0, 2)))
    assert isinstance(found, MaskMeaning)
    assert found.causal
    assert found.aux == (graph.segments,)
    assert "aux0[b, q]" in found.predicate
    assert "aux0[b, k]" in found.predicate
    # Two of them in one text, a disjunction in brackets.
    either = ia.any_of(same, ia.equal(ia.floor_divide(K, 2), ia.integer(1)))
    chunk = ia.equal(ia.remainder(K, 3), ia.integer(0))
    found = graph.meaning(ia.all_of(either, chunk))
    assert isinstance(found, MaskMeaning)
    assert re.search(r"\(.* or .*\) and |and \(.* or .*\)", found.predicate), found.predicate


def test_what_reads_large_tensors_is_a_dense_mask() -> None:
    graph, batch, zero = Graph(), axis(0), ia.integer(0)
    found = graph.meaning(ia.all_of(graph.of(graph.dense, batch, zero, Q, K), bound(None, 0, 2)))
    assert isinstance(found, MaskMeaning)
    assert (found.mask, found.causal) == (graph.dense, True)
    assert found.why_dense.startswith("mask-not-proven")
    assert found.hides
    inverted = graph.meaning(ia.negate(graph.of(graph.dense, batch, zero, Q, K)))
    assert isinstance(inverted, Unproven)
    assert inverted.code == "mask-not-proven"


def test_biases() -> None:
    graph, batch, zero = Graph(), axis(0), ia.integer(0)
    distance = ia.Call("float", (ia.add(ia.add(K, Q, -1), ia.integer(S - T)),))
    alibi = ia.Call("mul", (graph.of(graph.slopes, axis(1)), distance))
    found = graph.meaning(ia.TRUE, alibi)
    assert isinstance(found, MaskMeaning)
    assert (found.bias, found.aux) == ("aux0[h] * float(k - q)", (graph.slopes,))
    assert not found.hides
    dense = graph.meaning(ia.TRUE, graph.of(graph.added, batch, zero, Q, K))
    assert isinstance(dense, MaskMeaning)
    assert dense.mask is graph.added
    assert dense.why_dense.startswith("bias-from-data")
    assert not dense.hides
    by_row = graph.meaning(ia.TRUE, graph.of(graph.segments, batch, Q))
    assert isinstance(by_row, MaskMeaning)
    assert (by_row.bias, by_row.mask) == ("", None)
    unknown = graph.meaning(ia.TRUE, ia.Call("tanh", (graph.of(graph.added, batch, zero, Q, K),)))
    assert isinstance(unknown, Unproven)
    assert unknown.code == "bias-not-a-tensor"
    both = graph.meaning(
        graph.of(graph.dense, batch, zero, Q, K), graph.of(graph.added, batch, zero, Q, K)
    )
    assert isinstance(both, Unproven)
    assert both.code == "mask-and-bias"


LOW = ia.real(-1e9)


@pytest.mark.parametrize(
    ("score", "rounded", "hidden", "low"),
    [
        (INF, torch.float32, "", "-inf"),
        (LOW, torch.float32, "-1000000000.0", "-1000000000.0"),
        (ia.Call("add", (SCORE, LOW)), torch.float32, "s + -1000000000.0", "s + -1000000000.0"),
        (
            ia.Call("add", (SCORE, LOW)),
            torch.bfloat16,
            "bf16(s + -1000000000.0)",
            "bf16(s + -1000000000.0)",
        ),
        (ia.Call("add", (SCORE, ia.real(-1e4))), torch.float16, "f16(s + -10000.0)", None),
        # What the type's own limit is added to needs no rounding, nor does a number.
        (ia.Call("add", (SCORE, ia.real(-3e38))), torch.bfloat16, "", "s + -3e+38"),
        (ia.real(-1e30), torch.float32, "", "-1e+30"),
    ],
)
def test_what_hidden_scores_become(
    score: Expr, rounded: torch.dtype, hidden: str, low: str | None
) -> None:
    found = Graph().meaning(bound(None, 0, T - S), score=score, rounded=rounded)
    assert isinstance(found, MaskMeaning)
    assert found.hidden == hidden
    assert found.low == (hidden if low is None else low)


def test_a_hidden_score_that_cannot_be_said_is_not_proven() -> None:
    graph = Graph()
    for score in (None, ia.Call("tanh", (SCORE,)), ia.real(math.nan)):
        found = graph.meaning(bound(None, 0, 2), score=score)
        assert isinstance(found, Unproven)
        assert found.code == "hidden-not-read"


def test_a_dense_bias_in_a_hidden_score_is_the_mask() -> None:
    graph, zero = Graph(), ia.integer(0)
    bias = graph.of(graph.added, axis(0), zero, Q, K)
    for part in (bias, ia.Call("mul", (bias, ia.real(0.5)))):
        score = ia.Call("add", (SCORE, ia.Call("add", (part, ia.real(-1e4)))))
        found = graph.meaning(bound(None, 0, 2), bias, score=score)
        assert isinstance(found, MaskMeaning)
        wanted = "mask" if part is bias else "(mask * 0.5)"
        assert found.hidden == f"s + ({wanted} + -10000.0)"
        assert found.aux == ()


def test_a_computed_bias_in_a_hidden_score_is_the_mask_too() -> None:
    graph = Graph()
    doubled = graph.call(aten.mul.Tensor, graph.added, 2.0)
    zero = ia.integer(0)
    bias = ia.Call("mul", (graph.of(graph.added, axis(0), zero, Q, K), ia.real(2.0)))
    found = graph.meaning(bound(None, 0, 2), bias, score=ia.Call("add", (bias, ia.real(-1e4))))
    assert isinstance(found, MaskMeaning)
    assert found.mask is doubled
    assert found.hidden == "mask + -10000.0"


@pytest.mark.parametrize(
    ("visible", "is_safe", "score", "is_nan"),
    [
        # A causal row sees itself; a window that ends before it may see nothing.
        (bound(None, 0, 2), False, INF, False),
        (bound(-2, 0, 2), False, INF, False),
        (bound(None, -1, 2), False, INF, False),
        (bound(None, -3, 2), False, INF, True),
        (bound(1, None, 2), False, INF, True),
        (bound(None, -3, 2), True, INF, False),
        (bound(None, -3, 2), False, LOW, False),
        (bound(None, -3, 2), False, ia.Call("add", (SCORE, LOW)), False),
        (ia.equal(K, ia.integer(0)), False, INF, False),
        (ia.equal(K, ia.integer(1)), False, INF, True),
    ],
)
def test_rows_that_may_see_nothing(visible: Expr, is_safe: bool, score: Expr, is_nan: bool) -> None:
    found = Graph().meaning(visible, score=score, is_safe=is_safe)
    assert isinstance(found, MaskMeaning)
    assert found.empty_is_nan == is_nan


def test_padded_rows_may_see_nothing() -> None:
    graph = Graph()
    pad = graph.of(graph.pad, axis(0), K)
    for visible in (pad, ia.negate(graph.of(graph.hides, axis(0), K))):
        found = graph.meaning(visible, is_safe=False)
        assert isinstance(found, MaskMeaning)
        assert found.empty_is_nan
    # A bias from data may be minus infinity everywhere.
    found = graph.meaning(
        bound(None, 0, 2), graph.of(graph.table, axis(0), axis(1), Q, K), is_safe=False
    )
    assert isinstance(found, MaskMeaning)
    assert found.empty_is_nan


def test_more_queries_than_keys_leave_rows_empty() -> None:
    found = Graph(T + 2).meaning(bound(None, 0, -2), is_safe=False)
    assert isinstance(found, MaskMeaning)
    assert found.causal
    assert found.empty_is_nan
