"""A decoder with a learned bias for each bucket of distances, made in the first layer and handed
down; no scale, norms without mean."""

from __future__ import annotations

import math

import torch
from torch import nn

from helpers.public_models.sample import Sample, lively, tokens_of


class LayerNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


def relative_position_bucket(relative_position, num_buckets=8, max_distance=20):
    """Distances to the past: small ones each have a bucket, larger ones share one by logarithm."""
    relative_position = -torch.min(relative_position, torch.zeros_like(relative_position))
    max_exact = num_buckets // 2
    is_small = relative_position < max_exact
    large = max_exact + (
        torch.log(relative_position.float() / max_exact)
        / math.log(max_distance / max_exact)
        * (num_buckets - max_exact)
    ).to(torch.long)
    large = torch.min(large, torch.full_like(large, num_buckets - 1))
    return torch.where(is_small, relative_position, large)


class Attention(nn.Module):
    def __init__(self, d_model, n_heads, has_relative_bias):
        super().__init__()
        self.n_heads, self.d_kv = n_heads, d_model // n_heads
        self.q = nn.Linear(d_model, d_model, bias=False)
        self.k = nn.Linear(d_model, d_model, bias=False)
        self.v = nn.Linear(d_model, d_model, bias=False)
        self.o = nn.Linear(d_model, d_model, bias=False)
        self.relative_attention_bias = nn.Embedding(8, n_heads) if has_relative_bias else None

    def compute_bias(self, length):
        context_position = torch.arange(length, dtype=torch.long)[:, None]
        memory_position = torch.arange(length, dtype=torch.long)[None, :]
        buckets = relative_position_bucket(memory_position - context_position)
        values = self.relative_attention_bias(buckets).permute([2, 0, 1]).unsqueeze(0)
        causal = torch.tril(torch.ones(length, length))[None, None, :, :]
        return values + (1.0 - causal) * torch.finfo(values.dtype).min

    def forward(self, x, position_bias):
        batch_size = x.shape[0]

        def shape(states):
            return states.view(batch_size, -1, self.n_heads, self.d_kv).transpose(1, 2)

        q, k, v = shape(self.q(x)), shape(self.k(x)), shape(self.v(x))
        scores = torch.matmul(q, k.transpose(3, 2))
        if position_bias is None:
            position_bias = self.compute_bias(x.shape[1])
        scores += position_bias
        weights = nn.functional.softmax(scores.float(), dim=-1).type_as(scores)
        y = torch.matmul(weights, v).transpose(1, 2).contiguous().view(batch_size, -1, x.shape[2])
        return self.o(y), position_bias


class Decoder(nn.Module):
    def __init__(self, vocab=46, d_model=16, n_heads=2, n_layers=2):
        super().__init__()
        self.shared = nn.Embedding(vocab, d_model)
        self.attentions = nn.ModuleList(
            Attention(d_model, n_heads, i == 0) for i in range(n_layers)
        )
        self.norms = nn.ModuleList(LayerNorm(d_model) for _ in range(2 * n_layers + 1))
        self.wi = nn.ModuleList(nn.Linear(d_model, 32, bias=False) for _ in range(n_layers))
        self.wo = nn.ModuleList(nn.Linear(32, d_model, bias=False) for _ in range(n_layers))

    def forward(self, input_ids):
        x, bias = self.shared(input_ids), None
        for i, attention in enumerate(self.attentions):
            y, bias = attention(self.norms[2 * i](x), bias)
            x = x + y
            x = x + self.wo[i](torch.relu(self.wi[i](self.norms[2 * i + 1](x))))
        return nn.functional.linear(self.norms[-1](x) * x.shape[-1] ** -0.5, self.shared.weight)


def build() -> Sample:
    """The bias is learned, so it stays a dense operand, and a cache cannot be proven."""
    torch.manual_seed(14)
    make = tokens_of(46)
    model = lively(Decoder())
    return Sample(
        model, make(2, 12), (make(3, 17), make(1, 5)), "2 of 2 fused", "at relative_buckets.py:"
    )
