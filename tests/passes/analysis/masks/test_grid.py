"""The second test of a meaning: right ones agree, and one that is wrong in one place does not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from mask_graphs import MaskGraph
from torch import fx

from graphopt.passes.analysis.masks.grid import Candidate, agrees
from graphopt.passes.analysis.masks.meaning import MaskMeaning

aten = torch.ops.aten
B, H, S, T = 2, 3, 6, 6


class Scores(MaskGraph):
    """q @ k^T of fixed sizes, a causal condition, padding bits, a bias of heads."""

    def __init__(self) -> None:
        super().__init__()
        q = self.input("q", torch.randn(B, H, S, 4))
        k = self.input("k", torch.randn(B, H, 4, T))
        self.product = self.call(aten.matmul.default, q, k)
        j = self.call(aten.arange.default, T)
        i = self.call(aten.unsqueeze.default, self.call(aten.arange.default, S), 1)
        self.far = self.call(aten.sub.Tensor, i, j)
        self.causal = self.call(aten.ge.Scalar, self.far, 0)
        near = self.call(aten.lt.Scalar, self.far, 3)
        self.window = self.call(aten.bitwise_and.Tensor, self.causal, near)
        self.bits = self.input("bits", torch.ones(B, T, dtype=torch.int64))
        seen = self.call(aten.ne.Scalar, self.bits, 0)
        self.seen = self.call(aten.view.default, seen, [B, 1, 1, T])
        slopes = self.weight("slopes", torch.tensor([0.5, 1.0, 2.0]))
        flat = self.call(aten.mul.Tensor, self.call(aten.view.default, slopes, [H, 1, 1]), self.far)
        self.bias = self.call(aten.neg.default, flat)
        self.slopes = slopes
        # Nodes of the model that are no part of any mask, and that cannot be run.
        self.weight("elsewhere", torch.empty(3, device="meta"))

    def candidate(self, last: fx.Node, scale: float = 1.0, **more: Any) -> Candidate:
        given = {"softcap": 0.0, "is_safe": False, **more}
        return Candidate(last, self.product, (B, H, S, T), scale, **given)

    def hides(
        self, condition: fx.Node, low: float = -math.inf, x: fx.Node | None = None
    ) -> fx.Node:
        hidden = self.call(aten.logical_not.default, condition)
        return self.call(aten.masked_fill.Scalar, self.product if x is None else x, hidden, low)


def _cases() -> dict[str, tuple[Scores, Candidate, MaskMeaning, list[MaskMeaning]]]:
    """Graph, candidate, the right meaning, and wrong ones."""
    g = Scores()
    plain = MaskMeaning()
    nan = MaskMeaning(empty_is_nan=True)
    causal = replace(nan, causal=True)
    found: dict[str, tuple[Scores, Candidate, MaskMeaning, list[MaskMeaning]]] = {}
    found["causal"] = (g, g.candidate(g.hides(g.causal)), causal, [nan, replace(causal, window=2)])
    found["window"] = (
        g,
        g.candidate(g.hides(g.window)),
        replace(causal, window=3),
        [causal, replace(causal, window=2), replace(causal, window=4), replace(nan, window=3)],
    )
    found["filled"] = (
        g,
        g.candidate(g.hides(g.causal, -2.0)),
        replace(plain, causal=True, hidden="-2.0"),
        [causal, replace(causal, hidden="-3.0"), replace(causal, hidden="s + -2.0")],
    )
    found["padding"] = (
        g,
        g.candidate(g.hides(g.seen)),
        replace(nan, padding=(g.seen,)),
        [nan, replace(nan, hiding=(g.seen,)), replace(plain, padding=(g.seen,)), causal],
    )
    biased = g.call(aten.add.Tensor, g.product, g.bias)
    right = replace(nan, bias="aux0[h] * float(k - q)", aux=(g.slopes,))
    found["bias"] = (
        g,
        g.candidate(biased),
        right,
        [nan, replace(right, bias="aux0[h] * float(q - k)"), replace(right, bias="float(k - q)")],
    )
    found["dense bias"] = (g, g.candidate(biased), replace(nan, mask=g.bias), [nan, causal])
    found["residue"] = (
        g,
        g.candidate(biased, residue=True),
        replace(nan, why_dense="told"),
        [causal],
    )
    scaled = g.call(aten.mul.Tensor, g.product, 0.5)
    capped = g.call(aten.mul.Tensor, g.call(aten.tanh.default, scaled), 2.0)
    found["capped"] = (g, g.candidate(capped, 1.0, softcap=2.0), nan, [causal])
    row = g.call(
        aten.view.default, g.call(aten.arange.start, 1, S + 1, dtype=torch.float32), [S, 1]
    )
    for op, name in ((aten.mul.Tensor, "mul"), (aten.div.Tensor, "div")):
        by_row = g.call(op, g.product, row)
        found[f"{name} by row"] = (g, g.candidate(by_row, factor=(name, row)), nan, [causal])
    found["predicate"] = (
        g,
        g.candidate(g.hides(g.window)),
        replace(nan, predicate="q - k < 3 and k <= q"),
        [replace(nan, predicate="q - k < 3 or k <= q"), replace(nan, predicate="q - k < 2")],
    )
    g.returns()
    return found


CASES = _cases()


@pytest.mark.parametrize("name", CASES)
def test_right_meanings_agree_and_wrong_ones_do_not(name: str) -> None:
    g, candidate, right, wrong = CASES[name]
    assert agrees(g.graph, candidate, right)
    for meaning in wrong:
        assert not agrees(g.graph, candidate, meaning), meaning


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("causal", {"scale": 0.5}),
        ("causal", {"softcap": 1.0}),
        ("padding", {"is_safe": True}),
        ("capped", {"softcap": 3.0}),
        ("capped", {"softcap": 0.0}),
        ("mul by row", {"factor": None}),
        ("residue", {"residue": False}),
    ],
)
def test_a_candidate_that_is_read_wrongly_does_not_agree(name: str, change: dict[str, Any]) -> None:
    g, candidate, right, _ = CASES[name]
    assert not agrees(g.graph, replace(candidate, **change), right)


def test_a_factor_is_multiplied_or_divided_by() -> None:
    g, candidate, right, _ = CASES["mul by row"]
    assert candidate.factor is not None
    assert not agrees(g.graph, replace(candidate, factor=("div", candidate.factor[1])), right)


def test_an_sdpa_mask_stands_alone() -> None:
    """Booleans hide, floats are added; rows that see nothing are zeros there."""
    g = Scores()
    low = g.call(aten.where.Scalar, g.causal, 0.0, -math.inf)
    g.returns()
    causal = MaskMeaning(causal=True)
    for mask in (g.causal, low):
        alone = Candidate(mask, None, (B, H, S, T), 1.0, 0.0, is_safe=True)
        assert agrees(g.graph, alone, causal)
        assert not agrees(g.graph, alone, MaskMeaning())
        assert not agrees(g.graph, alone, replace(causal, window=1))


def test_half_precision_is_compared_as_coarsely_as_it_rounds() -> None:
    g = MaskGraph()
    q, k = (g.input(n, torch.randn(1, 1, 4, 4).bfloat16()) for n in "qk")
    product = g.call(aten.matmul.default, q, k)
    scaled = g.call(aten.mul.Tensor, product, 0.3)
    g.returns()
    for scale, is_same in ((0.3, True), (0.301, True), (0.6, False)):
        candidate = Candidate(scaled, product, (1, 1, 4, 4), scale, 0.0, is_safe=False)
        assert agrees(g.graph, candidate, MaskMeaning(empty_is_nan=True)) == is_same


def test_what_cannot_be_run_is_not_judged() -> None:
    g = Scores()
    last = g.call(aten.add.Tensor, g.product, g.weight("later", torch.zeros(S, T)))
    g.returns()
    assert not agrees(g.graph, g.candidate(last), MaskMeaning(causal=True))
    g.graph.weights["later"] = torch.empty(S, T, device="meta")
    assert agrees(g.graph, g.candidate(last), MaskMeaning(causal=True))
