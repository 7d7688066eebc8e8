"""Tiny attention models that differ in how they spell their mask, and masks to run them on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, WIDTH, VOCABULARY = 2, 8, 40
PADDINGS = ("none", "right", "left", "holes", "all")


def padded(batch: int, length: int, where: str) -> tuple[Tensor, Tensor]:
    """(ids, mask of zeros and ones `[B, S]`): the first batch element is padded."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    places = {"right": [-1, -2, -3], "left": [0, 1, 2], "holes": [1, 4], "none": []}
    mask[0, places.get(where, list(range(length)))] = 0
    return torch.randint(0, VOCABULARY, (batch, length)), mask


@dataclass(frozen=True, slots=True)
class Spelling:
    """form: how the scores get their mask. low: what hides. causal: on top of the padding."""

    form: str
    low: float
    causal: bool


class Spelled(nn.Module):
    """Attention with queries, keys and values `[B, H, S, D]` and a mask of one spelling."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """`[B, H, S, D]`"""
        a, n = self.spelling, q.shape[2]
        low = max(a.low, torch.finfo(q.dtype).min) if a.form == "bits" else a.low
        pad = (mask == 0)[:, None, None, :]
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        hides = pad | future if a.causal else pad
        if a.form == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=~hides)
        if a.form == "sdpa-added":
            added = torch.where(hides, low, 0.0).to(q.dtype)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=added)
        scores = q @ k.transpose(2, 3) * 0.3
        if a.form == "filled":
            scores = scores.masked_fill(hides, low)
        elif a.form == "added":
            scores = scores + torch.where(hides, low, 0.0).to(q.dtype)
        elif a.form == "twice":
            scores = scores + torch.where(pad, low, 0.0).to(q.dtype)
            if a.causal:
                scores = scores + torch.where(future, low, 0.0).to(q.dtype)
        elif a.form == "rows":
            scores = scores.masked_fill(hides | pad.transpose(2, 3), low)
        else:
            assert a.form == "bits"
            scores = scores + (1.0 - mask[:, None, None, :].to(q.dtype)) * low
            if a.causal:
                scores = scores.masked_fill(future, low)
        return scores.softmax(-1) @ v


class AllSpelled(nn.Module):
    """Spellings side by side, so that one export serves all."""

    def __init__(self, spellings: list[Spelling]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(map(Spelled, spellings))
        self.queries = nn.ModuleList(nn.Embedding(VOCABULARY, HEADS * WIDTH) for _ in spellings)
        self.keys, self.values = (nn.Embedding(VOCABULARY, HEADS * WIDTH) for _ in range(2))

    def forward(self, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """`[B, H, S, D]` of each."""

        def heads(table: nn.Module) -> Tensor:
            x: Tensor = table(input_ids)
            return x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)

        k, v = heads(self.keys), heads(self.values)
        pairs = zip(self.parts, self.queries, strict=True)
        return tuple(part(heads(queries), k, v, mask) for part, queries in pairs)
