"""An encoder of deep copies of one layer, sublayers called through lambdas, -1e9 filled in where a
mask that the caller gives is zero."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from helpers.public_models.sample import Sample, lively


def clones(module, N):
    "Produce N identical layers."
    return nn.ModuleList([copy.deepcopy(module) for _ in range(N)])


class LayerNorm(nn.Module):
    def __init__(self, features, eps=1e-6):
        super().__init__()
        self.a_2 = nn.Parameter(torch.ones(features))
        self.b_2 = nn.Parameter(torch.zeros(features))
        self.eps = eps

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        std = x.std(-1, keepdim=True)
        return self.a_2 * (x - mean) / (std + self.eps) + self.b_2


class SublayerConnection(nn.Module):
    def __init__(self, size, dropout):
        super().__init__()
        self.norm = LayerNorm(size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, sublayer):
        return x + self.dropout(sublayer(self.norm(x)))


def attention(query, key, value, mask=None, dropout=None):
    d_k = query.size(-1)
    scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(d_k)
    if mask is not None:
        scores = scores.masked_fill(mask == 0, -1e9)
    p_attn = scores.softmax(dim=-1)
    if dropout is not None:
        p_attn = dropout(p_attn)
    return torch.matmul(p_attn, value), p_attn


class MultiHeadedAttention(nn.Module):
    def __init__(self, h, d_model, dropout=0.1):
        super().__init__()
        self.d_k, self.h = d_model // h, h
        self.linears = clones(nn.Linear(d_model, d_model), 4)
        self.attn = None
        self.dropout = nn.Dropout(p=dropout)

    def forward(self, query, key, value, mask=None):
        if mask is not None:
            mask = mask.unsqueeze(1)
        nbatches = query.size(0)
        query, key, value = (
            lin(x).view(nbatches, -1, self.h, self.d_k).transpose(1, 2)
            for lin, x in zip(self.linears, (query, key, value), strict=False)
        )
        x, self.attn = attention(query, key, value, mask=mask, dropout=self.dropout)
        x = x.transpose(1, 2).contiguous().view(nbatches, -1, self.h * self.d_k)
        return self.linears[-1](x)


class EncoderLayer(nn.Module):
    def __init__(self, size, self_attn, feed_forward, dropout):
        super().__init__()
        self.self_attn, self.feed_forward = self_attn, feed_forward
        self.sublayer = clones(SublayerConnection(size, dropout), 2)

    def forward(self, x, mask):
        x = self.sublayer[0](x, lambda x: self.self_attn(x, x, x, mask))
        return self.sublayer[1](x, self.feed_forward)


class Encoder(nn.Module):
    def __init__(self, vocab, d_model, layer, N):
        super().__init__()
        self.lut, self.d_model = nn.Embedding(vocab, d_model), d_model
        self.layers, self.norm = clones(layer, N), LayerNorm(d_model)

    def forward(self, src, src_mask):
        x = self.lut(src) * math.sqrt(self.d_model)
        for layer in self.layers:
            x = layer(x, src_mask)
        return self.norm(x)


def build() -> Sample:
    """The mask is bool, [batch, 1, length]."""
    torch.manual_seed(16)

    def make(batch, length):
        ids = torch.randint(1, 50, (batch, length))
        ids[torch.arange(length)[None] >= torch.randint(2, length + 1, (batch, 1))] = 0
        return ids, (ids != 0).unsqueeze(-2)

    ff = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 16))
    layer = EncoderLayer(16, MultiHeadedAttention(2, 16), ff, 0.1)
    axes = {"src": {0: "batch", 1: "length"}, "src_mask": {0: "batch", 2: "length"}}
    model = lively(Encoder(50, 16, layer, 2))
    sizes = make(3, 17), make(2, 5)
    return Sample(model, make(2, 12), sizes, "2 of 2 fused", "src_mask", axes)
