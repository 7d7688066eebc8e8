"""A decoder without positions: each head adds its slope times the distance (ALiBi)."""

from __future__ import annotations

import math

import torch
from torch import nn

from helpers.public_models.sample import Sample, lively, tokens_of


def get_slopes(n_heads):
    n = 2 ** math.floor(math.log2(n_heads))
    m_0 = 2.0 ** (-8.0 / n)
    m = torch.pow(m_0, torch.arange(1, 1 + n))
    if n < n_heads:
        m_hat_0 = 2.0 ** (-4.0 / n)
        m_hat = torch.pow(m_hat_0, torch.arange(1, 1 + 2 * (n_heads - n), 2))
        m = torch.cat([m, m_hat])
    return m


def get_relative_positions(seq_len, device):
    x = torch.arange(seq_len, device=device)[None, :]
    y = torch.arange(seq_len, device=device)[:, None]
    return x - y


class ALiBiMultiHeadAttention(nn.Module):
    def __init__(self, d_model, num_heads, dropout):
        super().__init__()
        self.num_heads = num_heads
        self.scale = math.sqrt(d_model // num_heads)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("m", get_slopes(num_heads)[:, None, None])
        self.kqv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, x):
        batch_size, seq_len, _ = x.shape
        key, query, value = self.kqv(x).chunk(3, dim=-1)
        key = key.view(batch_size, seq_len, self.num_heads, -1).permute(0, 2, 3, 1)
        query = query.view(batch_size, seq_len, self.num_heads, -1).transpose(1, 2)
        value = value.view(batch_size, seq_len, self.num_heads, -1).transpose(1, 2)
        bias = (self.m * get_relative_positions(seq_len, x.device)).unsqueeze(0)
        score = torch.matmul(query, key) / self.scale + bias
        hidden = torch.ones(seq_len, seq_len, device=x.device).triu(1).bool()
        score = score.masked_fill(hidden, float("-inf"))
        attn = self.dropout(torch.softmax(score, dim=-1))
        out = torch.matmul(attn, value).transpose(1, 2).reshape(batch_size, seq_len, -1)
        return self.dropout(self.proj(out))


class TransformerLayer(nn.Module):
    def __init__(self, d_model, num_heads):
        super().__init__()
        self.attn_norm, self.ffn_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attn = ALiBiMultiHeadAttention(d_model, num_heads, 0.1)
        self.ffn = nn.Sequential(
            nn.Linear(d_model, 2 * d_model), nn.GELU(), nn.Linear(2 * d_model, d_model)
        )

    def forward(self, x):
        x = x + self.attn(self.attn_norm(x))
        return x + self.ffn(self.ffn_norm(x))


class ALiBiTransformer(nn.Module):
    def __init__(self, vocab_size=50, d_model=24, num_heads=3, num_layers=2):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, d_model)
        self.layers = nn.Sequential(
            *[TransformerLayer(d_model, num_heads) for _ in range(num_layers)]
        )
        self.head = nn.Linear(d_model, vocab_size)

    def forward(self, tokens):
        return self.head(self.layers(self.embed(tokens)))


def build() -> Sample:
    """Three heads, so the slopes come from two series; the paged cache has no kernel for a bias."""
    torch.manual_seed(9)
    make = tokens_of(50)
    model = lively(ALiBiTransformer())
    return Sample(
        model,
        make(2, 12),
        (make(3, 17), make(1, 5)),
        "2 of 2 fused",
        "bias that the paged cache has no kernel for at linear_bias.py:",
    )
