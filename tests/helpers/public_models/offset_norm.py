"""A decoder with (1 + weight) norms in float, an embedding scaled by the root of the width and used
again as the head, one key/value head, tanh GELU, positions as a dense float mask of -2.4e38."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from helpers.public_models.sample import Sample, lively, tokens_of


class OffsetRMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6, add_unit_offset=True):
        super().__init__()
        self.eps, self.add_unit_offset = eps, add_unit_offset
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        x_float = x.float()
        output = x_float * torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + self.eps)
        output = output * (1 + self.weight.float()) if self.add_unit_offset else output
        return output.type_as(x)


def rotate(x, freqs_cos, freqs_sin):
    """Halves of the head rotated against each other; x: [B, T, H, D]."""
    first, second = torch.chunk(x, 2, dim=-1)
    turned = (first * freqs_cos - second * freqs_sin, second * freqs_cos + first * freqs_sin)
    return torch.cat(turned, dim=-1)


class DecoderLayer(nn.Module):
    def __init__(self, width, heads, head_dim, inner):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.q_size = heads * head_dim
        self.qkv_proj = nn.Linear(width, (heads + 2) * head_dim, bias=False)
        self.o_proj = nn.Linear(self.q_size, width, bias=False)
        self.gate_proj = nn.Linear(width, inner)
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)
        self.input_layernorm = OffsetRMSNorm(width)
        self.post_attention_layernorm = OffsetRMSNorm(width)

    def forward(self, hidden_states, cos, sin, mask):
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        batch_size, input_len, _ = hidden_states.shape
        qkv = self.qkv_proj(hidden_states)
        xq, xk, xv = qkv.split([self.q_size, self.head_dim, self.head_dim], dim=-1)
        xq = rotate(xq.view(batch_size, -1, self.heads, self.head_dim), cos, sin)
        xk = rotate(xk.view(batch_size, -1, 1, self.head_dim), cos, sin)
        xv = xv.view(batch_size, -1, 1, self.head_dim)
        q, k, v = xq.transpose(1, 2), xk.transpose(1, 2), xv.transpose(1, 2)
        scores = torch.matmul(q * self.head_dim**-0.5, k.transpose(2, 3)) + mask
        scores = F.softmax(scores.float(), dim=-1).type_as(q)
        output = torch.matmul(scores, v).transpose(1, 2).contiguous()
        hidden_states = residual + self.o_proj(output.view(batch_size, input_len, -1))
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        gate = F.gelu(self.gate_proj(hidden_states), approximate="tanh")
        return residual + self.down_proj(gate * self.up_proj(hidden_states))


class Model(nn.Module):
    def __init__(self, vocab=55, width=32, heads=4, head_dim=8, layers=2, max_positions=128):
        super().__init__()
        self.width = width
        self.embedder = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(DecoderLayer(width, heads, head_dim, 48) for _ in range(layers))
        self.norm = OffsetRMSNorm(width)
        freqs = 1.0 / (10000 ** (torch.arange(0, head_dim, 2).float() / head_dim))
        angles = torch.outer(torch.arange(max_positions).float(), freqs)
        self.register_buffer("cos", angles.cos()[:, None, :])
        self.register_buffer("sin", angles.sin()[:, None, :])
        full = torch.full((1, 1, max_positions, max_positions), -2.3819763e38)
        self.register_buffer("mask", torch.triu(full, diagonal=1))

    def forward(self, input_token_ids):
        n = input_token_ids.shape[1]
        positions = torch.arange(0, n, device=input_token_ids.device)
        cos, sin = self.cos.index_select(0, positions), self.sin.index_select(0, positions)
        mask = self.mask.index_select(2, positions)[..., :n]
        hidden_states = self.embedder(input_token_ids)
        normalizer = torch.tensor(self.width**0.5, dtype=hidden_states.dtype)
        hidden_states = hidden_states * normalizer
        for layer in self.layers:
            hidden_states = layer(hidden_states, cos, sin, mask)
        hidden_states = self.norm(hidden_states)
        return torch.matmul(hidden_states, self.embedder.weight.t())


def build() -> Sample:
    """One key/value head for four query heads."""
    torch.manual_seed(8)
    make = tokens_of(55)
    return Sample(lively(Model()), make(2, 12), (make(3, 17), make(1, 5)), "2 of 2 fused")
