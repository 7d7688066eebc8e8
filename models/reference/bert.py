"""A BERT-like encoder as a plain nn.Module: attention in both directions, padding mask, post-norm.

    ids -> norm(embed + positions) -> [ norm(x + attention(x)) ; norm(x + mlp(x)) ] * layers

Architecture: Devlin et al. 2018, without segments and pooler. Needs nothing but torch, and exports
with dynamic batch and sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphopt.models.reference.attention import attend, merge_heads, split_heads


@dataclass(frozen=True, slots=True)
class BertLikeConfig:
    """Sizes. `hidden` must be a multiple of `heads`; sequences reach at most `max_positions`."""

    vocab_size: int = 256
    hidden: int = 64
    intermediate: int = 256
    layers: int = 2
    heads: int = 4
    max_positions: int = 128
    norm_eps: float = 1e-12


class Attention(nn.Module):
    """Attention in which every token sees every token that is not padding."""

    def __init__(self, config: BertLikeConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.hidden, config.hidden)
        self.key = nn.Linear(config.hidden, config.hidden)
        self.value = nn.Linear(config.hidden, config.hidden)
        self.out_proj = nn.Linear(config.hidden, config.hidden)

    def forward(self, x_BSE: Tensor, hidden_B11S: Tensor) -> Tensor:
        """`[B, S, E]` -> `[B, S, E]`; `hidden_B11S` is True for padding."""
        q_BHSD = split_heads(self.query(x_BSE), self.heads)
        k_BHSD = split_heads(self.key(x_BSE), self.heads)
        v_BHSD = split_heads(self.value(x_BSE), self.heads)
        out: Tensor = self.out_proj(merge_heads(attend(q_BHSD, k_BHSD, v_BHSD, hidden_B11S)))
        return out


class Layer(nn.Module):
    """One post-norm block."""

    def __init__(self, config: BertLikeConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.hidden, config.norm_eps)
        self.up_proj = nn.Linear(config.hidden, config.intermediate)
        self.down_proj = nn.Linear(config.intermediate, config.hidden)
        self.mlp_norm = nn.LayerNorm(config.hidden, config.norm_eps)

    def forward(self, x_BSE: Tensor, hidden_B11S: Tensor) -> Tensor:
        """`[B, S, E]` -> `[B, S, E]`."""
        x_BSE = self.attention_norm(x_BSE + self.attention(x_BSE, hidden_B11S))
        wide = nn.functional.gelu(self.up_proj(x_BSE))
        out: Tensor = self.mlp_norm(x_BSE + self.down_proj(wide))
        return out


class BertLike(nn.Module):
    """The whole encoder."""

    def __init__(self, config: BertLikeConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden)
        self.positions = nn.Embedding(config.max_positions, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, config.norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states `[B, S, E]` of int64 `input_ids [B, S]`, S <= max_positions.

        attention_mask: `[B, S]`, 1 for a token and 0 for padding, any integer or bool dtype. The
        states at padding are defined but mean nothing.
        """
        hidden_B11S = (attention_mask == 0)[:, None, None, :]
        positions_S = torch.arange(input_ids.shape[1], device=input_ids.device)
        x_BSE: Tensor = self.norm(self.tokens(input_ids) + self.positions(positions_S))
        for layer in self.layers:
            x_BSE = layer(x_BSE, hidden_B11S)
        return x_BSE
