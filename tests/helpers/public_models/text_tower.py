"""A text tower of nn.MultiheadAttention with a mask of its own, pooled at the end token, which has
the highest id; the length is fixed, as the mask is."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from helpers.public_models.sample import Sample, lively


class QuickGELU(nn.Module):
    def forward(self, x: torch.Tensor):
        return x * torch.sigmoid(1.702 * x)


class LayerNorm(nn.LayerNorm):
    """Subclass torch's LayerNorm to handle fp16."""

    def forward(self, x: torch.Tensor):
        orig_type = x.dtype
        ret = super().forward(x.type(torch.float32))
        return ret.type(orig_type)


class ResidualAttentionBlock(nn.Module):
    def __init__(self, d_model: int, n_head: int, attn_mask: torch.Tensor | None = None):
        super().__init__()
        self.attn = nn.MultiheadAttention(d_model, n_head)
        self.ln_1 = LayerNorm(d_model)
        self.mlp = nn.Sequential(
            OrderedDict(
                [
                    ("c_fc", nn.Linear(d_model, d_model * 4)),
                    ("gelu", QuickGELU()),
                    ("c_proj", nn.Linear(d_model * 4, d_model)),
                ]
            )
        )
        self.ln_2 = LayerNorm(d_model)
        self.attn_mask = attn_mask

    def attention(self, x: torch.Tensor):
        if self.attn_mask is not None:
            self.attn_mask = self.attn_mask.to(dtype=x.dtype, device=x.device)
        return self.attn(x, x, x, need_weights=False, attn_mask=self.attn_mask)[0]

    def forward(self, x: torch.Tensor):
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TextTower(nn.Module):
    def __init__(self, vocab_size=60, width=16, heads=2, layers=2, context_length=9, embed_dim=8):
        super().__init__()
        mask = torch.empty(context_length, context_length).fill_(float("-inf")).triu_(1)
        self.resblocks = nn.Sequential(
            *[ResidualAttentionBlock(width, heads, mask) for _ in range(layers)]
        )
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width).normal_())
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim).normal_())

    def forward(self, text):
        x = self.token_embedding(text)
        x = x + self.positional_embedding
        x = x.permute(1, 0, 2)
        x = self.resblocks(x)
        x = x.permute(1, 0, 2)
        x = self.ln_final(x)
        return x[torch.arange(x.shape[0]), text.argmax(dim=-1)] @ self.text_projection


def build() -> Sample:
    """The end token is 59; what follows it is 0."""
    torch.manual_seed(19)

    def make(batch):
        text = torch.randint(1, 59, (batch, 9))
        end = torch.randint(2, 9, (batch, 1))
        place = torch.arange(9)[None]
        return (text.masked_fill(place > end, 0).masked_fill(place == end, 59),)

    axes = {"text": {0: "batch"}}
    sizes = make(5), make(1)
    return Sample(lively(TextTower()), make(2), sizes, "2 of 2 fused", "sequence", axes)
