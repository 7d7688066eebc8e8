"""A recurrent language model: each token adds to a decaying sum, by cumsum over the sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from helpers.public_models.sample import Sample, lively, tokens_of


class DecayingSum(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.linspace(-0.2, -0.05, width))
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.gate, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        time = torch.arange(x.shape[1], device=x.device)[:, None]
        decay = time * self.decay.sigmoid() * 0.1
        weight = torch.exp(self.key(x).tanh() + decay)
        total = torch.cumsum(weight * self.value(x), dim=1) / torch.cumsum(weight, dim=1)
        return self.out(torch.sigmoid(self.gate(x)) * total)


class Recurrent(nn.Module):
    def __init__(self, vocabulary=40, width=16, layers=2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.mixers = nn.ModuleList(DecayingSum(width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return self.head(x)


def build() -> Sample:
    """The sum carries earlier tokens on outside attention: no KV cache."""
    torch.manual_seed(28)
    make = tokens_of(40)
    sizes = make(3, 17), make(1, 5)
    return Sample(
        lively(Recurrent()),
        make(2, 12),
        sizes,
        "no candidates",
        "aten.cumsum works along the token axis at cumulative_recurrence.py:",
    )
