"""A GPT-2-like decoder as a plain nn.Module: learned positions, LayerNorm, one fused qkv, GELU.

    ids -> embed + positions -> [ x + attention(norm(x)) ; x + mlp(norm(x)) ] * layers
        -> norm -> head

Architecture: Radford et al. 2019; the output head is the embedding matrix. Needs nothing but torch,
and exports with dynamic batch and sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphopt.models.reference.attention import attend, causal_mask, merge_heads, split_heads


@dataclass(frozen=True, slots=True)
class GPT2LikeConfig:
    """Sizes. `hidden` must be a multiple of `heads`; sequences reach at most `max_positions`."""

    vocab_size: int = 256
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    max_positions: int = 128
    norm_eps: float = 1e-5


class Attention(nn.Module):
    """Causal attention with the three projections in one matrix."""

    def __init__(self, config: GPT2LikeConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv_proj = nn.Linear(config.hidden, 3 * config.hidden)
        self.out_proj = nn.Linear(config.hidden, config.hidden)

    def forward(self, x_BSE: Tensor, hidden_SS: Tensor) -> Tensor:
        """`[B, S, E]` -> `[B, S, E]`; `hidden_SS` is True where a query must not look."""
        q_BHSD, k_BHSD, v_BHSD = (
            split_heads(part, self.heads) for part in self.qkv_proj(x_BSE).chunk(3, dim=-1)
        )
        out: Tensor = self.out_proj(merge_heads(attend(q_BHSD, k_BHSD, v_BHSD, hidden_SS)))
        return out


class Layer(nn.Module):
    """One pre-norm block; the MLP is four times as wide as the model."""

    def __init__(self, config: GPT2LikeConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden, config.norm_eps)
        self.up_proj = nn.Linear(config.hidden, 4 * config.hidden)
        self.down_proj = nn.Linear(4 * config.hidden, config.hidden)

    def forward(self, x_BSE: Tensor, hidden_SS: Tensor) -> Tensor:
        """`[B, S, E]` -> `[B, S, E]`."""
        x_BSE = x_BSE + self.attention(self.attention_norm(x_BSE), hidden_SS)
        wide = nn.functional.gelu(self.up_proj(self.mlp_norm(x_BSE)), approximate="tanh")
        out: Tensor = x_BSE + self.down_proj(wide)
        return out


class GPT2Like(nn.Module):
    """The whole decoder."""

    def __init__(self, config: GPT2LikeConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden)
        self.positions = nn.Embedding(config.max_positions, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        self.lm_head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits `[B, S, vocab]` of int64 `input_ids [B, S]`, S <= max_positions."""
        positions_S = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden_SS = causal_mask(positions_S)
        x_BSE = self.tokens(input_ids) + self.positions(positions_S)
        for layer in self.layers:
            x_BSE = layer(x_BSE, hidden_SS)
        logits: Tensor = self.lm_head(self.norm(x_BSE))
        return logits
