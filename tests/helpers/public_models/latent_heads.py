"""A decoder whose keys and values come from a narrow latent; a head of the keys has a rotated part
that all heads share, and values have another width than keys."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from helpers.public_models.sample import Sample, lively, tokens_of


class MLA(nn.Module):
    def __init__(self, dim=32, heads=2, nope=8, rope=4, v_dim=6, q_rank=16, kv_rank=12):
        super().__init__()
        self.heads, self.nope, self.rope, self.v_dim = heads, nope, rope, v_dim
        self.kv_rank = kv_rank
        self.wq_a = nn.Linear(dim, q_rank, bias=False)
        self.q_norm = nn.RMSNorm(q_rank)
        self.wq_b = nn.Linear(q_rank, heads * (nope + rope), bias=False)
        self.wkv_a = nn.Linear(dim, kv_rank + rope, bias=False)
        self.kv_norm = nn.RMSNorm(kv_rank)
        self.wkv_b = nn.Linear(kv_rank, heads * (nope + v_dim), bias=False)
        self.wo = nn.Linear(heads * v_dim, dim, bias=False)
        self.softmax_scale = (nope + rope) ** -0.5

    def forward(self, x, cos, sin, mask):
        bsz, seqlen, _ = x.size()
        q = self.wq_b(self.q_norm(self.wq_a(x))).view(bsz, seqlen, self.heads, -1)
        q_nope, q_pe = torch.split(q, [self.nope, self.rope], dim=-1)
        kv, k_pe = torch.split(self.wkv_a(x), [self.kv_rank, self.rope], dim=-1)
        q_pe, k_pe = turn(q_pe, cos, sin), turn(k_pe.unsqueeze(2), cos, sin)
        q = torch.cat([q_nope, q_pe], dim=-1)
        kv = self.wkv_b(self.kv_norm(kv)).view(bsz, seqlen, self.heads, self.nope + self.v_dim)
        k_nope, v = torch.split(kv, [self.nope, self.v_dim], dim=-1)
        k = torch.cat([k_nope, k_pe.expand(-1, -1, self.heads, -1)], dim=-1)
        scores = torch.einsum("bshd,bthd->bhst", q, k) * self.softmax_scale
        scores += mask
        scores = scores.softmax(dim=-1, dtype=torch.float32).type_as(x)
        return self.wo(torch.einsum("bhst,bthd->bshd", scores, v).flatten(2))


def turn(x, cos, sin):
    """Interleaved pairs; x: [B, S, H, D]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return pairs.flatten(-2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = MLA()
        self.attn_norm, self.ffn_norm = nn.RMSNorm(32), nn.RMSNorm(32)
        self.w1, self.w3 = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
        self.w2 = nn.Linear(48, 32, bias=False)

    def forward(self, x, cos, sin, mask):
        x = x + self.attn(self.attn_norm(x), cos, sin, mask)
        y = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class Transformer(nn.Module):
    def __init__(self, vocab=59, layers=2, max_seq_len=64):
        super().__init__()
        self.embed = nn.Embedding(vocab, 32)
        self.layers = nn.ModuleList([Block() for _ in range(layers)])
        self.norm, self.head = nn.RMSNorm(32), nn.Linear(32, vocab, bias=False)
        angles = torch.outer(torch.arange(max_seq_len).float(), torch.tensor([1.0, 0.1]))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens):
        seqlen = tokens.size(1)
        h = self.embed(tokens)
        cos, sin = self.cos[:seqlen].unsqueeze(1), self.sin[:seqlen].unsqueeze(1)
        mask = torch.full((seqlen, seqlen), float("-inf"), device=tokens.device).triu_(1)
        for layer in self.layers:
            h = layer(h, cos, sin, mask)
        return self.head(self.norm(h))


def build() -> Sample:
    """Keys of width 12, values of width 6."""
    torch.manual_seed(11)
    make = tokens_of(59)
    return Sample(lively(Transformer()), make(2, 12), (make(3, 17), make(1, 5)), "2 of 2 fused")
