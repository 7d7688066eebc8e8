"""Learned latents read a long input by cross-attention, then attend to each other; the input's own
mask hides its padding."""

from __future__ import annotations

import torch
from torch import einsum, nn

from helpers.public_models.sample import Sample, lively


def exists(val):
    return val is not None


def default(val, d):
    return val if exists(val) else d


class GEGLU(nn.Module):
    def forward(self, x):
        x, gates = x.chunk(2, dim=-1)
        return x * nn.functional.gelu(gates)


class PreNorm(nn.Module):
    def __init__(self, dim, fn, context_dim=None):
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(context_dim) if exists(context_dim) else None

    def forward(self, x, **kwargs):
        x = self.norm(x)
        if exists(self.norm_context):
            kwargs.update(context=self.norm_context(kwargs["context"]))
        return self.fn(x, **kwargs)


class Attention(nn.Module):
    def __init__(self, query_dim, context_dim=None, heads=2, dim_head=8):
        super().__init__()
        inner_dim = dim_head * heads
        context_dim = default(context_dim, query_dim)
        self.scale, self.heads = dim_head**-0.5, heads
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(context_dim, inner_dim * 2, bias=False)
        self.to_out = nn.Linear(inner_dim, query_dim)

    def forward(self, x, context=None, mask=None):
        h = self.heads
        q = self.to_q(x)
        context = default(context, x)
        k, v = self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (
            t.reshape(t.shape[0], t.shape[1], h, -1).transpose(1, 2).reshape(-1, t.shape[1], 8)
            for t in (q, k, v)
        )
        sim = einsum("b i d, b j d -> b i j", q, k) * self.scale
        if exists(mask):
            max_neg_value = -torch.finfo(sim.dtype).max
            mask = mask[:, None].expand(-1, h, -1).reshape(-1, 1, mask.shape[-1])
            sim = sim.masked_fill(~mask, max_neg_value)
        out = einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)
        out = out.reshape(-1, h, out.shape[1], 8).transpose(1, 2).flatten(2)
        return self.to_out(out)


class Perceiver(nn.Module):
    def __init__(self, dim=12, queries=4, latent_dim=16, depth=2, classes=5):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(queries, latent_dim))
        self.cross = PreNorm(latent_dim, Attention(latent_dim, dim), context_dim=dim)
        self.cross_ff = self.feed_forward(latent_dim)
        self.layers = nn.ModuleList([])
        for _ in range(depth):
            block = PreNorm(latent_dim, Attention(latent_dim)), self.feed_forward(latent_dim)
            self.layers.append(nn.ModuleList(block))
        self.to_logits = nn.Linear(latent_dim, classes)

    @staticmethod
    def feed_forward(dim):
        return PreNorm(
            dim, nn.Sequential(nn.Linear(dim, 4 * dim), GEGLU(), nn.Linear(2 * dim, dim))
        )

    def forward(self, data, mask):
        b = data.shape[0]
        x = self.latents[None].repeat(b, 1, 1)
        x = self.cross(x, context=data, mask=mask) + x
        x = self.cross_ff(x) + x
        for self_attn, self_ff in self.layers:
            x = self_attn(x) + x
            x = self_ff(x) + x
        return self.to_logits(x.mean(dim=1))


def build() -> Sample:
    """The length of the input is open, that of the latents is not."""
    torch.manual_seed(25)

    def make(batch, length):
        mask = torch.arange(length)[None] < torch.randint(2, length + 1, (batch, 1))
        return torch.randn(batch, length, 12), mask

    axes = {"data": {0: "batch", 1: "length"}, "mask": {0: "batch", 1: "length"}}
    sizes = make(3, 17), make(2, 5)
    return Sample(lively(Perceiver()), make(2, 12), sizes, "3 of 3 fused", "token ids", axes)
