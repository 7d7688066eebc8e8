"""An encoder with segment embeddings; its padding mask is a byte per pair, repeated over queries,
and its GELU and positions are spelled by hand."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from helpers.public_models.sample import Sample, lively


class PositionalEmbedding(nn.Module):
    def __init__(self, d_model, max_len=64):
        super().__init__()
        pe = torch.zeros(max_len, d_model).float()
        pe.requires_grad = False
        position = torch.arange(0, max_len).float().unsqueeze(1)
        div_term = (torch.arange(0, d_model, 2).float() * -(math.log(10000.0) / d_model)).exp()
        pe[:, 0::2] = torch.sin(position * div_term)
        pe[:, 1::2] = torch.cos(position * div_term)
        self.register_buffer("pe", pe.unsqueeze(0))

    def forward(self, x):
        return self.pe[:, : x.size(1)]


class GELU(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


class MultiHeadedAttention(nn.Module):
    def __init__(self, h, d_model):
        super().__init__()
        self.d_k, self.h = d_model // h, h
        self.linear_layers = nn.ModuleList([nn.Linear(d_model, d_model) for _ in range(3)])
        self.output_linear = nn.Linear(d_model, d_model)

    def forward(self, query, key, value, mask=None):
        batch_size = query.size(0)
        query, key, value = [
            layer(x).view(batch_size, -1, self.h, self.d_k).transpose(1, 2)
            for layer, x in zip(self.linear_layers, (query, key, value), strict=True)
        ]
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.size(-1))
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        x = torch.matmul(F.softmax(scores, dim=-1), value)
        x = x.transpose(1, 2).contiguous().view(batch_size, -1, self.h * self.d_k)
        return self.output_linear(x)


class TransformerBlock(nn.Module):
    def __init__(self, hidden, attn_heads):
        super().__init__()
        self.attention = MultiHeadedAttention(attn_heads, hidden)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), GELU(), nn.Linear(4 * hidden, hidden)
        )
        self.input_norm, self.output_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def forward(self, x, mask):
        y = self.input_norm(x)
        x = x + self.attention.forward(y, y, y, mask=mask)
        return x + self.feed_forward(self.output_norm(x))


class BERT(nn.Module):
    def __init__(self, vocab_size=50, hidden=16, n_layers=2, attn_heads=2):
        super().__init__()
        self.token = nn.Embedding(vocab_size, hidden, padding_idx=0)
        self.position = PositionalEmbedding(hidden)
        self.segment = nn.Embedding(3, hidden, padding_idx=0)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(hidden, attn_heads) for _ in range(n_layers)]
        )
        self.next_sentence = nn.Linear(hidden, 2)
        self.mask_lm = nn.Linear(hidden, vocab_size)

    def forward(self, x, segment_info):
        mask = (x > 0).unsqueeze(1).repeat(1, x.size(1), 1).unsqueeze(1)
        x = self.token(x) + self.position(x) + self.segment(segment_info)
        for transformer in self.transformer_blocks:
            x = transformer.forward(x, mask)
        next_sentence = F.log_softmax(self.next_sentence(x[:, 0]), dim=-1)
        return next_sentence, F.log_softmax(self.mask_lm(x), dim=-1)


def build() -> Sample:
    """Two outputs; segments are 1, then 2, and 0 where padded."""
    torch.manual_seed(17)

    def make(batch, length):
        ids = torch.randint(1, 50, (batch, length))
        ids[torch.arange(length)[None] >= torch.randint(3, length + 1, (batch, 1))] = 0
        segments = 1 + (torch.arange(length) > length // 2).long()
        return ids, (segments[None] * (ids > 0)).contiguous()

    model = lively(BERT())
    return Sample(model, make(2, 12), (make(3, 17), make(2, 5)), "2 of 2 fused", "segment_info")
