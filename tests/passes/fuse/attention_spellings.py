"""Random spellings of attention, for the property test: how a model author might write it.

A Spelling is drawn, applied to q, k, v `[B, S, H, D]` and a padding mask, and knows what the
recogniser owes it: fused, or rejected with a code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

HEADS, WIDTH, VOCABULARY = 4, 8, 50
MEANINGS = ("none", "causal", "window", "two-sided", "chunked", "prefix", "padded", "causal+padded")
FORMS = ("where", "masked_fill", "add", "commuted", "additive-mul", "two-adds", "scores-where")
SPOILS = ("", "", "", "", "axis", "dropout", "probabilities", "scores", "doubled")
CODES = {
    "axis": "softmax-axis",
    "dropout": "dropout-on",
    "probabilities": "probabilities-used",
    "scores": "scores-used",
    "doubled": "not-scores",
}


@dataclass(frozen=True, slots=True)
class Spelling:
    """See the module docstring. spoil: what makes it no attention, "" for nothing."""

    meaning: str
    form: str
    scale: float
    scale_place: str
    divide: bool
    product: str
    repeat: str
    softmax: str
    dtype: torch.dtype
    softcap: float
    hidden: float
    off_dropout: bool
    spoil: str

    @property
    def code(self) -> str:
        """The rejection that it must get; "" when it must be fused."""
        if self.product == "sdpa":
            return CODES["dropout"] if self.spoil == "dropout" else ""
        return CODES.get(self.spoil, "")


def spellings() -> st.SearchStrategy[Spelling]:
    """Any combination."""
    return st.builds(
        Spelling,
        meaning=st.sampled_from(MEANINGS),
        form=st.sampled_from(FORMS),
        scale=st.sampled_from((1.0, 0.25, 1 / math.sqrt(WIDTH), 2.0)),
        scale_place=st.sampled_from(("q", "k", "scores", "after-cast")),
        divide=st.booleans(),
        product=st.sampled_from(("matmul", "matmul", "at-permuted", "bmm", "einsum", "sdpa")),
        repeat=st.sampled_from(("none", "interleave", "expand", "multi-query")),
        softmax=st.sampled_from(("method", "functional", "float32", "shifted")),
        dtype=st.sampled_from((torch.float32, torch.float32, torch.bfloat16)),
        softcap=st.sampled_from((0.0, 0.0, 20.0)),
        hidden=st.sampled_from((float("-inf"), -1e9, torch.finfo(torch.bfloat16).min)),
        off_dropout=st.booleans(),
        spoil=st.sampled_from(SPOILS),
    )


def visible(spelling: Spelling, s: int | torch.SymInt, pad_BS: Tensor) -> Tensor:
    """Boolean, broadcastable to `[B, 1, S, S]`."""
    j = torch.arange(s)
    i = j[:, None]
    meaning = spelling.meaning
    if meaning == "causal":
        return (j <= i)[None, None]
    if meaning == "window":
        return ((j <= i) & (j > i - 3))[None, None]
    if meaning == "two-sided":
        return ((i - j).abs() < 3)[None, None]
    if meaning == "chunked":
        return ((j <= i) & (i // 4 == j // 4))[None, None]
    if meaning == "prefix":
        return ((j <= i) | (j < 4))[None, None]
    if meaning == "padded":
        return pad_BS[:, None, None, :].bool()
    if meaning == "causal+padded":
        return (j <= i)[None, None] & pad_BS[:, None, None, :].bool()
    raise AssertionError(meaning)


class Attention(nn.Module):
    """One spelling."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling
        self.dropout = nn.Dropout(0.1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pad_BS: Tensor) -> Tensor:
        """q `[B, S, H, D]`, k and v with fewer heads when they are repeated."""
        a = self.spelling
        q, k, v = (x.to(a.dtype) for x in (q, k, v))
        if a.product != "einsum":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (self.repeated(x) for x in (k, v))
        if a.product == "sdpa":
            return self.by_sdpa(q, k, v, pad_BS)
        if a.scale_place == "q":
            q = self.scaled(q)
        if a.scale_place == "k":
            k = self.scaled(k)
        folded = a.product == "bmm"
        b, heads, s, d = q.shape if a.product != "einsum" else q.transpose(1, 2).shape
        if folded:
            q, k, v = (x.reshape(b * heads, s, d) for x in (q, k, v))
        scores = self.scores(q, k)
        if folded:
            scores = scores.view(b, heads, s, s)
        weights = self.weights(scores, pad_BS)
        if folded:
            weights = weights.view(b * heads, s, s)
        if a.product == "einsum":
            out = torch.einsum("bhij,bjhd->bihd", weights, v).transpose(1, 2)
        else:
            out = weights @ v
        if folded:
            out = out.view(b, heads, s, d)
        if a.spoil == "probabilities":
            out = out + weights.view(b, heads, s, s).sum(-1, keepdim=True)
        if a.spoil == "scores":
            out = out + scores.amax(-1, keepdim=True)
        return out.float()

    def by_sdpa(self, q: Tensor, k: Tensor, v: Tensor, pad_BS: Tensor) -> Tensor:
        """scaled_dot_product_attention with a mask of the spelling's form."""
        a = self.spelling
        dropout = 0.1 if a.spoil == "dropout" else 0.0
        if a.meaning == "none":
            mask = None
        else:
            mask = visible(a, q.shape[2], pad_BS)
            if a.form in ("add", "commuted", "additive-mul", "two-adds"):
                mask = torch.where(mask, 0.0, a.hidden).to(a.dtype)
        attend = F.scaled_dot_product_attention
        return attend(q, k, v, attn_mask=mask, dropout_p=dropout, scale=a.scale).float()

    def scaled(self, x: Tensor) -> Tensor:
        """Multiplied, or divided by the inverse."""
        return x / (1 / self.spelling.scale) if self.spelling.divide else x * self.spelling.scale

    def repeated(self, x: Tensor) -> Tensor:
        """Heads of keys and values repeated; heads are axis 1, or 2 for einsum."""
        a = self.spelling
        axis = 2 if a.product == "einsum" else 1
        if a.repeat == "interleave":
            return x.repeat_interleave(HEADS // x.shape[axis], axis)
        if a.repeat == "multi-query" and a.product != "sdpa":
            sizes = [-1, -1, -1, -1]
            sizes[axis] = HEADS
            return x.expand(*sizes)
        if a.repeat != "none":
            count = HEADS // x.shape[axis]
            sizes = list(x.shape)
            sizes[axis] = HEADS
            again = x.unsqueeze(axis + 1)
            wide = list(again.shape)
            wide[axis + 1] = count
            return again.expand(*wide).reshape(*sizes)
        return x

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """q @ k^T by the spelling's product."""
        a = self.spelling
        if a.product == "einsum":
            return torch.einsum("bihd,bjhd->bhij", q, k)
        if a.product == "bmm":
            return torch.bmm(q, k.transpose(1, 2))
        if a.product == "at-permuted":
            return q @ k.permute(0, 1, 3, 2)
        return torch.matmul(q, k.transpose(-1, -2))

    def weights(self, scores: Tensor, pad_BS: Tensor) -> Tensor:
        """Scale, softcap, mask, softmax, dropout that is off."""
        a = self.spelling
        if a.scale_place == "scores":
            scores = self.scaled(scores)
        if a.scale_place == "after-cast":
            scores = self.scaled(scores.float())
        if a.softcap:
            scores = torch.tanh(scores / a.softcap) * a.softcap
        if a.spoil == "doubled":
            scores = scores * scores
        if a.meaning != "none":
            scores = self.masked(scores, pad_BS)
        axis = 2 if a.spoil == "axis" else -1
        if a.softmax == "float32":
            weights = F.softmax(scores, axis, dtype=torch.float32)
        elif a.softmax == "shifted":
            weights = torch.softmax(scores - scores.amax(axis, keepdim=True), axis)
        elif a.softmax == "functional":
            weights = F.softmax(scores, dim=axis)
        else:
            weights = scores.softmax(axis)
        weights = weights.to(a.dtype)
        if a.spoil == "dropout":
            return F.dropout(weights, 0.1, training=True)
        return self.dropout(weights) if a.off_dropout else weights

    def masked(self, scores: Tensor, pad_BS: Tensor) -> Tensor:
        """The mask in the spelling's form."""
        a = self.spelling
        seen = visible(a, scores.shape[-1], pad_BS)
        if a.form == "where":
            return scores + torch.where(seen, 0.0, a.hidden).to(scores.dtype)
        if a.form == "masked_fill":
            return scores.masked_fill(~seen, a.hidden)
        if a.form == "scores-where":
            return torch.where(seen, scores, a.hidden)
        if a.form == "two-adds":
            j = torch.arange(scores.shape[-1])
            always = torch.where((j >= 0)[None, None, None], 0.0, a.hidden)
            return scores + torch.where(seen, 0.0, a.hidden).to(scores.dtype) + always
        # A bool times -inf would be nan where it is false.
        low = max(a.hidden, -1e9)
        if a.form == "additive-mul":
            return scores + (1.0 - seen.to(scores.dtype)) * low
        added = torch.zeros_like(scores).masked_fill(~seen, a.hidden)
        return added + scores if a.form == "commuted" else scores + added


class Spellings(nn.Module):
    """Several of them side by side over one embedding, so that one export serves many cases."""

    def __init__(self, drawn: list[Spelling]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Attention(a) for a in drawn)
        # Queries of their own: equal products of two parts would be merged into one.
        self.queries = nn.ModuleList(nn.Embedding(VOCABULARY, HEADS * WIDTH) for _ in drawn)
        self.k = nn.Embedding(VOCABULARY, HEADS * WIDTH)
        self.v = nn.Embedding(VOCABULARY, HEADS * WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """`[B, H, S, D]` of each spelling."""
        b, s = input_ids.shape
        k, v = (e(input_ids).view(b, s, HEADS, WIDTH) for e in (self.k, self.v))
        outputs = []
        for part, embed in zip(self.parts, self.queries, strict=True):
            assert isinstance(part, Attention)
            kept = kv_heads(part.spelling)
            q = embed(input_ids).view(b, s, HEADS, WIDTH)
            outputs.append(part(q, k[:, :, :kept], v[:, :, :kept], attention_mask))
        return tuple(outputs)


def kv_heads(spelling: Spelling) -> int:
    """How many key/value heads the spelling starts from."""
    return {"none": HEADS, "multi-query": 1}.get(spelling.repeat, 2)


def inputs(generator: Any = None) -> tuple[Tensor, Tensor]:
    """Fresh ids and a right-padded mask whose every row shows its first token."""
    batch, length = 2 + int(torch.randint(0, 3, ())), 6 + int(torch.randint(0, 9, ()))
    ids = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    return ids, (torch.arange(length) < lengths).long()
