"""A decoder with normalised queries and keys and a soft cap on scores and on logits; rotary by
einsum and interleaved pairs."""

from __future__ import annotations

import torch
from torch import Tensor, einsum, nn

from helpers.public_models.sample import Sample, lively, tokens_of


class RotaryEmbedding(nn.Module):
    def __init__(self, dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        inv_freq = 1.0 / (theta ** (torch.arange(0, dim, 2).float() / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, seq_len: int) -> Tensor:
        t = torch.arange(seq_len, device=self.inv_freq.device).type_as(self.inv_freq)
        freqs = einsum("i , j -> i j", t, self.inv_freq)
        return torch.stack((freqs, freqs), dim=-1).flatten(-2)


def rotate_pairs(x: Tensor) -> Tensor:
    x = x.unflatten(-1, (-1, 2))
    x1, x2 = x.unbind(dim=-1)
    return torch.stack((-x2, x1), dim=-1).flatten(-2)


def apply_rotary(freqs: Tensor, t: Tensor) -> Tensor:
    return (t * freqs.cos()) + (rotate_pairs(t) * freqs.sin())


def softcap(t: Tensor, value: float) -> Tensor:
    return (t / value).tanh() * value


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(dim_head), nn.RMSNorm(dim_head)
        self.rotary_emb = RotaryEmbedding(dim_head)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        freqs = self.rotary_emb(x.shape[1])
        q, k = apply_rotary(freqs, q), apply_rotary(freqs, k)
        sim = softcap(einsum("b h i d, b h j d -> b h i j", q, k), 5.0)
        i, j = sim.shape[-2:]
        causal_mask = torch.ones((i, j), device=x.device, dtype=torch.bool).triu(j - i + 1)
        sim = sim.masked_fill(causal_mask, -torch.finfo(sim.dtype).max)
        out = einsum("b h i j, b h j d -> b h i d", sim.softmax(dim=-1), v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    def __init__(self, num_tokens: int = 45, dim: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.layers = nn.ModuleList([])
        for _ in range(depth):
            ff = nn.Sequential(
                nn.RMSNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
            )
            self.layers.append(nn.ModuleList([Attention(dim, 2, 8), ff]))
        self.norm = nn.RMSNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_emb(ids)
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return softcap(self.to_logits(self.norm(x)), 30.0)


def build() -> Sample:
    """The scores have no scale: the norms stand for it."""
    torch.manual_seed(60)
    make = tokens_of(45)
    return Sample(lively(Transformer()), make(2, 12), (make(3, 17), make(1, 5)), "2 of 2 fused")
