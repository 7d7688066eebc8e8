"""An encoder whose integer mask has three values: 0 padding, 1 local, 2 seen by and seeing all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from helpers.public_models.sample import Sample, lively


class GlobalLocalAttention(nn.Module):
    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.dense = nn.Linear(width, width)

    def allowed(self, attention_mask: Tensor) -> Tensor:
        """bool [B, S, S]: what each query sees."""
        place = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        near = (place[:, None] - place[None, :]).abs() <= self.window
        is_global = attention_mask == 2
        seen = near[None] | is_global[:, None, :] | is_global[:, :, None]
        return seen & (attention_mask > 0)[:, None, :]

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.query(hidden)), split(self.key(hidden)), split(self.value(hidden))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~self.allowed(attention_mask)[:, None], -1e9)
        return self.dense((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    def __init__(self, vocabulary=50, width=16, heads=2, windows=(1, 3)) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(64, width)
        self.attentions = nn.ModuleList(GlobalLocalAttention(width, heads, w) for w in windows)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in windows)
        self.classifier = nn.Linear(width, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids)
        x = x + self.places(torch.arange(input_ids.shape[1], device=x.device))
        for attention, norm in zip(self.attentions, self.norms, strict=True):
            x = norm(x + attention(x, attention_mask))
        return self.classifier(x)


def build() -> Sample:
    """The first token of each row is global, some are padding."""
    torch.manual_seed(18)

    def make(batch, length):
        mask = torch.randint(1, 3, (batch, length))
        mask[:, 0] = 2
        mask[torch.arange(length)[None] >= torch.randint(4, length + 1, (batch, 1))] = 0
        return torch.randint(0, 50, (batch, length)), mask

    model = lively(Encoder())
    return Sample(model, make(2, 12), (make(3, 17), make(2, 6)), "2 of 2 fused", "attention_mask")
