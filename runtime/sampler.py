"""Choosing tokens from logits, each request by its own settings.

Randomness is keyed by (seed, position): one uniform number from a counter-based generator, then
the inverse of the cumulative distribution in float64, over the tokens by id, or by rank where top-k
or top-p rank them. Each row is computed by itself, so the same request gives the same tokens
whatever it is batched with, however its prompt is chunked, and after a preemption.

top-k, top-p and min-p apply in this order, each to what the one before kept. Equal logits rank by
token id, so `top_k=1` is greedy. Penalties and bans come before all of it (`logits_processors`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import BackendError
from graphopt.runtime.logits_processors import History, process
from graphopt.runtime.request import SamplingParams

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_AFTER_SETTINGS = " after the request's own penalties and bans"


class NonFiniteLogitsError(BackendError):
    """Logits that are no distribution (NaN, +inf, or all -inf).

    rows: their row numbers. detail: what made them so, as far as that is known.
    """

    def __init__(self, rows: tuple[int, ...], detail: str = "") -> None:
        super().__init__(f"logits of rows {list(rows)} are NaN, infinite or all -inf{detail}")
        self.rows, self.detail = rows, detail


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row to sample: its settings, its seed, and the position of the token to choose.

    history: the tokens before it, needed where `params.has_processors`.
    """

    params: SamplingParams
    seed: int
    position: int
    history: History | None = None


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

    Raises NonFiniteLogitsError when a row holds NaN or +inf, or nothing but -inf, and when its own
    settings rule out every token.
    """
    peaks_L, best_L = logits_LV.max(dim=-1)
    # NaN counts as the largest value, so the largest tells whether there is one.
    wrong = tuple((~torch.isfinite(peaks_L)).nonzero()[:, 0].tolist())
    if wrong:
        raise NonFiniteLogitsError(wrong)
    tokens: list[int] = best_L.tolist()
    # float32 holds every smaller type; numpy has no bfloat16.
    dtype = torch.promote_types(logits_LV.dtype, torch.float32)
    for index, row in enumerate(rows):
        history = row.history if row.params.has_processors else None
        if history is None and row.params.temperature == 0.0:
            continue
        logits_V = logits_LV[index].cpu().to(dtype)
        if history is not None:
            logits_V = process(logits_V, row.params, history)
            peak, best = logits_V.max(dim=-1)
            if not torch.isfinite(peak):
                raise NonFiniteLogitsError((index,), _AFTER_SETTINGS)
            tokens[index] = int(best)
        if row.params.temperature > 0.0:
            tokens[index] = _draw(logits_V, row)
    return tokens


def _draw(logits_V: Tensor, row: SamplingRow) -> int:
    """One row at a time: its vectors stay in the processor's cache, a batch of them would not."""
    params = row.params
    is_ranked = 0 < params.top_k < len(logits_V) or params.top_p < 1.0
    candidates_C = _ranked(logits_V, params.top_k) if is_ranked else logits_V
    # Subtracted first: any temperature above 0 then stays within the range of float64.
    shifted_C = candidates_C.double() - candidates_C.max().double()
    weights_C = (shifted_C / params.temperature).exp()
    if params.top_p < 1.0:
        cumulative_C = weights_C.cumsum(0)
        count = int(torch.searchsorted(cumulative_C, params.top_p * cumulative_C[-1])) + 1
        weights_C = weights_C[:count]
    # The most likely token has weight 1.
    weights_C = torch.where(weights_C >= params.min_p, weights_C, 0.0)
    cumulative_C = weights_C.cumsum(0)
    # At most 1 - 2^-53 times the total, which rounds to less than the total: some token exceeds it.
    point = uniform(row.seed, row.position) * cumulative_C[-1]
    chosen = int(torch.searchsorted(cumulative_C, point, right=True))
    if not is_ranked:
        return chosen
    logit = candidates_C[chosen]
    equals_before = int((candidates_C[:chosen] == logit).sum())
    return int((logits_V == logit).nonzero()[equals_before])


def _ranked(logits_V: Tensor, top_k: int) -> Tensor:
    """The `top_k` largest logits (0: all), largest first."""
    negated = -logits_V.numpy()
    if 0 < top_k < len(negated):
        negated = np.partition(negated, top_k - 1)[:top_k]
    # numpy sorts a vocabulary in a tenth of torch's time.
    return torch.from_numpy(-np.sort(negated))
