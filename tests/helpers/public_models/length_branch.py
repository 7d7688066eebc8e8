"""A decoder with a Python branch on the length: plain causal attention while the window covers the
sequence, a banded mask beyond; a smoothly capped head."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from helpers.public_models.sample import Sample, lively, tokens_of


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def windowed_attention(q, k, v, window):
    """q, k, v: [B, H, T, D]; window: keys before the query that it sees."""
    length = q.size(2)
    if window >= length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    row = torch.arange(length, device=q.device).unsqueeze(1)
    col = torch.arange(length, device=q.device).unsqueeze(0)
    mask = (col <= row) & ((row - col) <= window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Layer(nn.Module):
    def __init__(self, width, heads, window):
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        batch, length, width = x.shape
        shape = (batch, length, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(norm(x)).view(shape).permute(2, 0, 3, 1, 4)
        y = windowed_attention(norm(q), norm(k), v, self.window)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.relu(self.up(norm(x))) ** 2)


class Model(nn.Module):
    def __init__(self, vocabulary=50, width=16, heads=2, windows=(24, 96)):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads, window) for window in windows)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = norm(self.embed(tokens))
        for layer in self.layers:
            x = layer(x)
        return 15 * torch.tanh(self.head(norm(x)) / 15)


def build() -> Sample:
    """All lengths are on the example's side of the branch."""
    torch.manual_seed(4)
    make = tokens_of(50)
    return Sample(lively(Model()), make(2, 12), (make(3, 17), make(1, 5)), "2 of 2 fused")
