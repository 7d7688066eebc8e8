"""What looks like a softmax under attention is left alone, with a code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_block import code
from torch import Tensor


def by_exponentials(s: Tensor) -> Tensor:
    powers = torch.exp(s - s.amax(-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True)


def by_powers_of_two(s: Tensor) -> Tensor:
    powers = torch.exp2(s * 1.44269504)
    return powers * powers.sum(-1, keepdim=True).reciprocal()


@pytest.mark.parametrize(
    ("normalise", "expected"),
    [
        (by_exponentials, "softmax-by-hand"),
        (by_powers_of_two, "softmax-by-hand"),
        (lambda s: torch.exp(s - s.logsumexp(-1, keepdim=True)), "softmax-by-hand"),
        (torch.sigmoid, "not-softmax"),
        (lambda s: s.bfloat16().softmax(-1).float(), "rounded-between"),
        (lambda s: s.bfloat16().float().softmax(-1), "rounded-between"),
        (lambda s: s.softmax(-1).half().float(), "rounded-between"),
        (lambda s: torch.log_softmax(s, -1), "not-softmax"),
    ],
)
def test_what_looks_like_a_softmax(normalise: Callable[[Tensor], Tensor], expected: str) -> None:
    assert code(lambda q, k, v: normalise(q @ k.transpose(2, 3) * 0.5) @ v) == expected
