"""A decoder whose feed-forward is a loop over experts: every expert sees every token, and its share
is nought for those that the router sent elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.public_models.sample import Sample, lively, tokens_of


class Expert(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MixtureOfExperts(nn.Module):
    def __init__(self, width: int, inner: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Expert(width, inner) for _ in range(experts))
        self.chosen = chosen

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        top, picked = torch.topk(scores, self.chosen, dim=-1)
        shares = torch.softmax(top, dim=-1, dtype=torch.float).to(x.dtype)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            share = (shares * (picked == number)).sum(dim=-1, keepdim=True)
            out = out + share * expert(x)
        return out


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.moe = MixtureOfExperts(width, 24, experts=4, chosen=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.moe(self.norm2(x))


class Decoder(nn.Module):
    def __init__(self, vocabulary=48, width=16, heads=2, layers=2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def build() -> Sample:
    """The routers have a softmax each, which is no attention."""
    torch.manual_seed(26)
    make = tokens_of(48)
    model = lively(Decoder())
    return Sample(model, make(2, 12), (make(3, 17), make(1, 5)), "2 of 4 fused, 2 rejected")
