"""Choosing tokens from logits, each request by its own settings.

Randomness is keyed by (seed, position): one uniform number from a counter-based generator, then
the inverse of the cumulative distribution over the vocabulary, in float64. Everything is computed
row by row in a fixed order, so the same request gives the same tokens whatever it is batched with,
however its prompt is chunked, and after a preemption.

top-k, top-p and min-p apply in this order, each to what the one before kept. Equal logits rank by
token id, so `top_k=1` is greedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import BackendError
from graphopt.runtime.request import SamplingParams

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class NonFiniteLogitsError(BackendError):
    """Logits that are no distribution (NaN, +inf, or all -inf). `rows`: their row numbers."""

    def __init__(self, rows: tuple[int, ...], detail: str = "") -> None:
        super().__init__(f"logits of rows {list(rows)} are NaN, infinite or all -inf{detail}")
        self.rows = rows


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row to sample: its settings, its seed, and the position of the token to choose."""

    params: SamplingParams
    seed: int
    position: int


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from (seed, position), by splitmix64 (Steele et al., OOPSLA 2014)."""
    return (_mix(_mix(seed) ^ (position * _GOLDEN & _MASK)) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sample(logits_LV: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """One token a row of `logits_LV` (float `[L, V]`); -inf rules a token out.

    Raises NonFiniteLogitsError when a row holds NaN or +inf, or nothing but -inf.
    """
    peaks_L, best_L = logits_LV.max(dim=-1)
    # NaN counts as the largest value, so the largest tells whether there is one.
    wrong = tuple((~torch.isfinite(peaks_L)).nonzero()[:, 0].tolist())
    if wrong:
        raise NonFiniteLogitsError(wrong)
    tokens: list[int] = best_L.tolist()
    drawn = [index for index, row in enumerate(rows) if row.params.temperature > 0.0]
    if drawn:
        # float32 holds every smaller type; numpy has no bfloat16.
        dtype = torch.promote_types(logits_LV.dtype, torch.float32)
        chosen = _draw(logits_LV[drawn].cpu().to(dtype), [rows[index] for index in drawn])
        for index, token in zip(drawn, chosen, strict=True):
            tokens[index] = token
    return tokens


def _draw(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    weights_RV = _weights(logits_RV, rows)
    _keep_most_likely(logits_RV, weights_RV, rows)
    if any(row.params.min_p for row in rows):
        # The most likely token has weight 1.
        weights_RV *= weights_RV >= _column([row.params.min_p for row in rows])
    cumulative_RV = weights_RV.cumsum(-1)
    # At most 1 - 2^-53 times the total, which rounds to less than the total: some token exceeds it.
    points_R1 = _column([uniform(row.seed, row.position) for row in rows]) * cumulative_RV[:, -1:]
    chosen: list[int] = torch.searchsorted(cumulative_RV, points_R1, right=True)[:, 0].tolist()
    return chosen


def _weights(logits_RC: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Probabilities relative to the row's largest, float64 (0.0 when they underflow)."""
    logits_RC = logits_RC.double()
    # Subtracted first: any temperature above 0 then stays within the range of float64.
    shifted_RC = logits_RC - logits_RC.amax(dim=-1, keepdim=True)
    return (shifted_RC / _column([row.params.temperature for row in rows])).exp()


def _keep_most_likely(logits_RV: Tensor, weights_RV: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Zero the weights that top-k and top-p drop, in place."""
    vocabulary = logits_RV.shape[-1]
    limited = [
        index
        for index, row in enumerate(rows)
        if 0 < row.params.top_k < vocabulary or row.params.top_p < 1.0
    ]
    if not limited:
        return
    part = [rows[index] for index in limited]
    top_k_P1 = torch.tensor([[min(row.params.top_k or vocabulary, vocabulary)] for row in part])
    top_p_P1 = _column([row.params.top_p for row in part])
    logits_PV = logits_RV[limited]
    # numpy sorts a vocabulary in a tenth of torch's time.
    ranked_PV = torch.from_numpy(-np.sort(-logits_PV.numpy()))
    cumulative_PV = _weights(ranked_PV, part).cumsum(-1)
    needed_P1 = top_p_P1 * cumulative_PV.gather(-1, top_k_P1 - 1)
    reached_P1 = (cumulative_PV < needed_P1).sum(-1, keepdim=True) + 1
    counts_P1 = torch.where(top_p_P1 < 1.0, torch.minimum(reached_P1, top_k_P1), top_k_P1)
    lowest_P1 = ranked_PV.gather(-1, counts_P1 - 1)
    above_PV, equal_PV = logits_PV > lowest_P1, logits_PV == lowest_P1
    room_P1 = counts_P1 - above_PV.sum(-1, keepdim=True)
    kept_PV = above_PV | (equal_PV & (equal_PV.cumsum(-1) <= room_P1))
    weights_RV[limited] = weights_RV[limited] * kept_PV


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]
