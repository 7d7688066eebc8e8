"""Choosing tokens from logits, each request by its own settings.

Randomness is keyed by (seed, position): one uniform number from a counter-based generator, then
the inverse of the cumulative distribution. The same request therefore gives the same tokens
whatever it is batched with, however its prompt is chunked, and after a preemption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from graphopt.runtime.request import SamplingParams
from torch import Tensor

from graphopt.errors import BackendError

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row to sample: its settings, its seed, and the position of the token to choose."""

    params: SamplingParams
    seed: int
    position: int


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from (seed, position): two rounds of splitmix64 (Steele et al. 2014)."""
    return (_mix(_mix(seed) ^ (position * 0x9E3779B97F4A7C15 & _MASK)) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sample(logits_LV: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """One token a row of `logits_LV` (float `[L, V]`).

    Raises BackendError when a row has no finite maximum.
    """
    best = torch.argmax(logits_LV, dim=-1)
    peaks = logits_LV.gather(1, best[:, None])[:, 0].tolist()
    for index, peak in enumerate(peaks):
        if not float("-inf") < peak < float("inf"):
            raise BackendError(f"logits of row {index} have maximum {peak}; the model diverged")
    tokens = best.tolist()
    for index, row in enumerate(rows):
        if row.params.temperature > 0.0:
            tokens[index] = _draw(logits_LV[index], row)
    return tokens


def _draw(logits_V: Tensor, row: SamplingRow) -> int:
    """Temperature, then top-k, top-p and min-p on the sorted distribution."""
    params = row.params
    count = min(params.top_k or logits_V.shape[0], logits_V.shape[0])
    # Stable order makes ties independent of the batch; float64 keeps the tail of the sum.
    ordered, tokens = torch.sort(logits_V.double(), descending=True, stable=True)
    ordered, tokens = ordered[:count], tokens[:count]
    probabilities = torch.softmax(ordered / params.temperature, dim=-1)
    if params.top_p < 1.0:
        before = probabilities.cumsum(0) - probabilities
        probabilities = torch.where(before < params.top_p, probabilities, 0.0)
    if params.min_p > 0.0:
        floor = params.min_p * probabilities[0]
        probabilities = torch.where(probabilities >= floor, probabilities, 0.0)
    cumulative = probabilities.cumsum(0)
    point = uniform(row.seed, row.position) * cumulative[-1]
    chosen = int(torch.searchsorted(cumulative, point, right=True))
    last = int(torch.count_nonzero(probabilities)) - 1
    return int(tokens[min(chosen, last)])
