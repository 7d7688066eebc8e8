"""A Llama-like decoder as a plain nn.Module: RMSNorm, RoPE, grouped queries, SwiGLU.

    ids -> embed -> [ x + attention(norm(x)) ; x + mlp(norm(x)) ] * layers -> norm -> lm_head

Architecture: Touvron et al. 2023 (Llama), Ainslie et al. 2023 (grouped queries). Needs nothing but
torch, and exports with dynamic batch and sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphopt.models.reference.attention import attend, causal_mask, merge_heads, split_heads


@dataclass(frozen=True, slots=True)
class LlamaLikeConfig:
    """Sizes. `heads` must be a multiple of `kv_heads`, and `hidden / heads` even."""

    vocab_size: int = 256
    hidden: int = 64
    intermediate: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        """Columns of one head."""
        return self.hidden // self.heads


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`, computed in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as `x`; the last axis is normalised."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Rope(nn.Module):
    """Cosines and sines of the rotary embedding (Su et al. 2021), in the rotate-half layout."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        exponent = torch.arange(0, head_dim, 2).float() / head_dim
        self.register_buffer("inv_freq", theta**-exponent, persistent=False)

    def forward(self, positions_S: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), float32 `[S, D]`; both halves of D hold the same angles."""
        angles = positions_S[:, None].float() * self.inv_freq
        angles_SD = torch.cat([angles, angles], dim=-1)
        return angles_SD.cos(), angles_SD.sin()


def rotate(x_BHSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Turn column i together with column i + D/2 by the angle of its position."""
    first, second = x_BHSD.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x_BHSD * cos_SD.to(x_BHSD.dtype) + turned * sin_SD.to(x_BHSD.dtype)


class Attention(nn.Module):
    """Causal attention where each KV head serves `heads / kv_heads` query heads."""

    def __init__(self, config: LlamaLikeConfig) -> None:
        super().__init__()
        kv_width = config.kv_heads * config.head_dim
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.q_proj = nn.Linear(config.hidden, config.hidden, bias=False)
        self.k_proj = nn.Linear(config.hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x_BSE: Tensor, cos_SD: Tensor, sin_SD: Tensor, hidden_SS: Tensor) -> Tensor:
        """`[B, S, E]` -> `[B, S, E]`; `hidden_SS` is True where a query must not look."""
        q_BHSD = rotate(split_heads(self.q_proj(x_BSE), self.heads), cos_SD, sin_SD)
        k_BhSD = rotate(split_heads(self.k_proj(x_BSE), self.kv_heads), cos_SD, sin_SD)
        v_BhSD = split_heads(self.v_proj(x_BSE), self.kv_heads)
        copies = self.heads // self.kv_heads
        k_BHSD = k_BhSD.repeat_interleave(copies, dim=1)
        v_BHSD = v_BhSD.repeat_interleave(copies, dim=1)
        out: Tensor = self.o_proj(merge_heads(attend(q_BHSD, k_BHSD, v_BHSD, hidden_SS)))
        return out


class MLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))` (Shazeer 2020)."""

    def __init__(self, config: LlamaLikeConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., E]` -> `[..., E]`."""
        out: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One pre-norm block."""

    def __init__(self, config: LlamaLikeConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BSE: Tensor, cos_SD: Tensor, sin_SD: Tensor, hidden_SS: Tensor) -> Tensor:
        """`[B, S, E]` -> `[B, S, E]`."""
        x_BSE = x_BSE + self.self_attn(self.input_layernorm(x_BSE), cos_SD, sin_SD, hidden_SS)
        out: Tensor = x_BSE + self.mlp(self.post_attention_layernorm(x_BSE))
        return out


class LlamaLike(nn.Module):
    """The whole decoder."""

    def __init__(self, config: LlamaLikeConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden)
        self.rope = Rope(config.head_dim, config.rope_theta)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits `[B, S, vocab]` of int64 `input_ids [B, S]`."""
        positions_S = torch.arange(input_ids.shape[1], device=input_ids.device)
        cos_SD, sin_SD = self.rope(positions_S)
        hidden_SS = causal_mask(positions_S)
        x_BSE = self.embed_tokens(input_ids)
        for layer in self.layers:
            x_BSE = layer(x_BSE, cos_SD, sin_SD, hidden_SS)
        logits: Tensor = self.lm_head(self.norm(x_BSE))
        return logits
