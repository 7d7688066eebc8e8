"""A decoder that computes attention and feed-forward side by side from one projection, one
key/value head for all queries."""

from __future__ import annotations

import torch
from torch import einsum, nn

from helpers.public_models.sample import Sample, lively, tokens_of


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x) + x


def rotate_half(x):
    x1, x2 = x.unflatten(-1, (2, -1)).unbind(dim=-2)
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(pos, t):
    return (t * pos.cos()) + (rotate_half(t) * pos.sin())


class ParallelTransformerBlock(nn.Module):
    def __init__(self, dim, dim_head=8, heads=2, ff_mult=2):
        super().__init__()
        self.norm = nn.LayerNorm(dim, bias=False)
        inner, ff_inner = dim_head * heads, dim * ff_mult
        self.fused_dims = (inner, dim_head, dim_head, ff_inner * 2)
        self.heads, self.scale = heads, dim_head**-0.5
        self.fused_attn_ff_proj = nn.Linear(dim, sum(self.fused_dims), bias=False)
        self.attn_out = nn.Linear(inner, dim, bias=False)
        self.ff_out = nn.Linear(ff_inner, dim, bias=False)
        inv_freq = 1.0 / (10000 ** (torch.arange(0, dim_head, 2).float() / dim_head))
        self.register_buffer("inv_freq", inv_freq)

    def rotary(self, n, device):
        seq = torch.arange(n, device=device, dtype=self.inv_freq.dtype)
        freqs = einsum("i , j -> i j", seq, self.inv_freq)
        return torch.cat((freqs, freqs), dim=-1)

    def forward(self, x):
        n, device = x.shape[1], x.device
        x = self.norm(x)
        q, k, v, ff = self.fused_attn_ff_proj(x).split(self.fused_dims, dim=-1)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        positions = self.rotary(n, device)
        q, k = (apply_rotary_pos_emb(positions, t) for t in (q, k))
        q = q * self.scale
        sim = einsum("b h i d, b j d -> b h i j", q, k)
        causal_mask = torch.ones((n, n), device=device, dtype=torch.bool).triu(1)
        sim = sim.masked_fill(causal_mask, -torch.finfo(sim.dtype).max)
        sim = sim - sim.amax(dim=-1, keepdim=True).detach()
        attn = sim.softmax(dim=-1)
        out = einsum("b h i j, b j d -> b h i d", attn, v).transpose(1, 2).flatten(2)
        ff, gate = ff.chunk(2, dim=-1)
        return self.attn_out(out) + self.ff_out(nn.functional.silu(gate) * ff)


def build() -> Sample:
    """A Sequential; its largest score is taken off before the softmax."""
    torch.manual_seed(30)
    make = tokens_of(52)
    blocks = [Residual(ParallelTransformerBlock(16)) for _ in range(2)]
    model = nn.Sequential(nn.Embedding(52, 16), *blocks, nn.LayerNorm(16), nn.Linear(16, 52))
    return Sample(lively(model), make(2, 12), (make(3, 17), make(1, 5)), "2 of 2 fused")
