"""The sampler: distributions by chi-square, kept sets against transformers, and its keys."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from graphopt.errors import BackendError
from graphopt.runtime import sampler
from graphopt.runtime.request import SamplingParams
from graphopt.runtime.sampler import NonFiniteLogitsError, SamplingRow, sample, uniform

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 2.5},
    {"temperature": 0.8, "top_k": 3},
    {"temperature": 1.3, "top_p": 0.7},
    {"temperature": 0.9, "min_p": 0.2},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.85, "min_p": 0.05},
]


def probabilities(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """The distribution by transformers' own processors, in float64."""
    chain = LogitsProcessorList([TemperatureLogitsWarper(float(params.temperature))])
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        chain.append(MinPLogitsWarper(params.min_p))
    scores = chain(torch.zeros(1, 1, dtype=torch.long), logits_V.double()[None])
    return torch.softmax(scores[0], -1)


def chi_square_limit(freedom: int, z: float = 4.0) -> float:
    """Upper quantile by Wilson and Hilferty's approximation; z=4 is about 3e-5."""
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


def assert_distributed(counts: np.ndarray, expected: np.ndarray) -> None:
    total = counts.sum()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    wanted = expected[possible] * total
    assert wanted.min() > 5
    statistic = ((counts[possible] - wanted) ** 2 / wanted).sum()
    assert statistic < chi_square_limit(int(possible.sum()) - 1)


def random_params(rng: np.random.Generator, **fixed: Any) -> SamplingParams:
    choices: dict[str, Any] = {
        "temperature": float(rng.choice([0.0, 0.3, 1.0, 2.0])),
        "top_k": int(rng.choice([0, 1, 5, 300, 10**6])),
        "top_p": float(rng.choice([1.0, 0.999, 0.9, 0.5, 1e-9])),
        "min_p": float(rng.choice([0.0, 0.01, 0.3, 1.0])),
    }
    return SamplingParams(**{**choices, **fixed})


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_draws_follow_the_distribution(setting: dict[str, Any], vary: str) -> None:
    params = SamplingParams(**setting)
    logits_V, draws = torch.tensor([0.3, -1.1, 1.2, 0.0, -0.6, 1.0, 0.7, -0.2]), 4_000
    rows = [
        SamplingRow(params, n if vary == "seed" else 77, n if vary == "position" else 5)
        for n in range(draws)
    ]
    tokens = sample(logits_V.expand(draws, -1), rows)
    counts = np.bincount(tokens, minlength=8)
    assert_distributed(counts, probabilities(logits_V, params).numpy())


def test_chi_square_notices_a_wrong_temperature() -> None:
    logits_V = torch.linspace(-2, 2, 8)
    params = SamplingParams(temperature=1.0)
    tokens = sample(logits_V.expand(8_000, -1), [SamplingRow(params, n, 0) for n in range(8_000)])
    wrong = probabilities(logits_V, SamplingParams(temperature=1.1)).numpy()
    with pytest.raises(AssertionError):
        assert_distributed(np.bincount(tokens, minlength=8), wrong)


def test_consecutive_positions_are_independent() -> None:
    params, draws = SamplingParams(temperature=1.0), 4_000
    logits_V = torch.tensor([0.3, -0.2, 0.5])
    rows = [SamplingRow(params, seed, place) for seed in range(draws) for place in (4, 5)]
    tokens = np.array(sample(logits_V.expand(2 * draws, -1), rows)).reshape(draws, 2)
    p = probabilities(logits_V, params).numpy()
    pairs = np.bincount(tokens[:, 0] * 3 + tokens[:, 1], minlength=9)
    assert_distributed(pairs, np.outer(p, p).reshape(-1))


def test_uniform_is_in_range_and_keyed_by_both() -> None:
    values = {uniform(seed, position) for seed in range(100) for position in range(100)}
    assert len(values) == 10_000
    assert all(0.0 <= value < 1.0 for value in values)
    assert uniform(2**63 - 1, 10**6) == uniform(2**63 - 1, 10**6)


def test_same_token_as_the_inverse_of_transformers_distribution() -> None:
    rng = np.random.default_rng()
    for vocabulary in (2, 50, 3000):
        logits_RV = torch.from_numpy(rng.normal(0, 3, (60, vocabulary))).float()
        rows = [
            SamplingRow(
                random_params(rng, temperature=float(rng.choice([0.3, 1.0, 4.0]))),
                int(rng.integers(2**62)),
                int(rng.integers(10**5)),
            )
            for _ in range(60)
        ]
        tokens = sample(logits_RV, rows)
        for logits_V, row, token in zip(logits_RV, rows, tokens, strict=True):
            p = probabilities(logits_V, row.params).numpy()
            is_ranked = 0 < row.params.top_k < vocabulary or row.params.top_p < 1.0
            order = np.argsort(-p, kind="stable") if is_ranked else np.arange(vocabulary)
            cumulative = np.cumsum(p[order])
            point = uniform(row.seed, row.position)
            # Within rounding of the border between two tokens, either is right.
            low = np.searchsorted(cumulative, point - 1e-12, side="right")
            high = np.searchsorted(cumulative, point + 1e-12, side="right")
            assert token in order[low : high + 1]
            assert p[token] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tokens_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    rng = np.random.default_rng()
    # bfloat16 has many equal logits.
    logits_RV = torch.from_numpy(rng.normal(0, 3, (24, 2000))).to(dtype)
    rows = [SamplingRow(random_params(rng), int(rng.integers(2**62)), n) for n in range(24)]
    together = sample(logits_RV, rows)
    assert [sample(logits_RV[n : n + 1], [rows[n]])[0] for n in range(24)] == together
    order = rng.permutation(24)
    shuffled = sample(logits_RV[order], [rows[n] for n in order])
    assert shuffled == [together[n] for n in order]


def test_other_seeds_and_positions_give_other_tokens() -> None:
    params = SamplingParams(temperature=5.0)
    logits_RV = torch.randn(1, 5000).expand(50, -1)
    by_seed = sample(logits_RV, [SamplingRow(params, n, 3) for n in range(50)])
    by_position = sample(logits_RV, [SamplingRow(params, 3, n) for n in range(50)])
    assert len(set(by_seed)) > 40
    assert len(set(by_position)) > 40


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"temperature": 3.0, "top_k": 1}])
def test_greedy_takes_the_first_of_equal_logits(how: dict[str, Any]) -> None:
    logits_V = torch.randn(300).clamp(max=0.5)
    assert (logits_V == 0.5).sum() > 10
    first = int((logits_V == 0.5).nonzero()[0])
    rows = [SamplingRow(SamplingParams(**how), n, 0) for n in range(100)]
    assert set(sample(logits_V.expand(100, -1), rows)) == {first}


def test_top_k_among_equal_logits_keeps_exactly_k() -> None:
    logits_V = torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0, 0.0, 1.0])
    rows = [SamplingRow(SamplingParams(temperature=9.0, top_k=4), n, 0) for n in range(500)]
    assert set(sample(logits_V.expand(500, -1), rows)) == {0, 1, 2, 4}


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    logits_V = torch.tensor([0.1, 0.4, 0.3, 0.2]).double().log()
    for top_p, kept in ((0.39, {1}), (0.41, {1, 2}), (0.71, {1, 2, 3}), (0.95, {0, 1, 2, 3})):
        rows = [SamplingRow(SamplingParams(temperature=1.0, top_p=top_p), n, 0) for n in range(500)]
        assert set(sample(logits_V.expand(500, -1), rows)) == kept


def test_top_p_reached_exactly_needs_no_further_token() -> None:
    rows = [SamplingRow(SamplingParams(temperature=1.0, top_p=0.5), n, 0) for n in range(500)]
    assert set(sample(torch.zeros(4).expand(500, -1), rows)) == {0, 1}


@pytest.mark.parametrize("edge", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_unit_interval(edge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: edge)
    for _ in range(50):
        logits_RV = torch.randn(20, 300) * 3
        logits_RV[:, [0, -1]] = -math.inf
        tokens = sample(logits_RV, [SamplingRow(SamplingParams(temperature=1.0), 0, 0)] * 20)
        assert set(tokens) == {1 if edge == 0.0 else 298}


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e300])
def test_extreme_temperatures(temperature: float) -> None:
    logits_V = torch.randn(40) * 100
    rows = [SamplingRow(SamplingParams(temperature=temperature), n, 0) for n in range(200)]
    tokens = set(sample(logits_V.expand(200, -1), rows))
    assert (tokens == {int(logits_V.argmax())}) == (temperature < 1)
    assert tokens <= set(range(40))


def test_minus_infinity_rules_a_token_out() -> None:
    logits_V = torch.full((6,), -math.inf)
    logits_V[[2, 4]] = torch.tensor([0.0, -1.0])
    for params in (SamplingParams(temperature=50.0), SamplingParams(temperature=1.0, top_k=5)):
        rows = [SamplingRow(params, n, 0) for n in range(300)]
        assert set(sample(logits_V.expand(300, -1), rows)) == {2, 4}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_and_infinity_raise(bad: float, temperature: float) -> None:
    logits_LV = torch.randn(3, 50)
    logits_LV[1, 17] = bad
    rows = [SamplingRow(SamplingParams(temperature=temperature), n, 0) for n in range(3)]
    with pytest.raises(NonFiniteLogitsError, match=r"logits of rows \[1\] are NaN") as caught:
        sample(logits_LV, rows)
    assert caught.value.rows == (1,)
    assert isinstance(caught.value, BackendError)


def test_nothing_but_minus_infinity_raises() -> None:
    logits_LV = torch.full((2, 5), -math.inf)
    with pytest.raises(NonFiniteLogitsError, match=r"rows \[0, 1\]"):
        sample(logits_LV, [SamplingRow(SamplingParams(), 0, 0)] * 2)


def test_logits_are_not_changed() -> None:
    logits_LV = torch.randn(4, 30)
    before = logits_LV.clone()
    sample(
        logits_LV, [SamplingRow(SamplingParams(temperature=1.0, top_k=3), n, 0) for n in range(4)]
    )
    assert torch.equal(logits_LV, before)
