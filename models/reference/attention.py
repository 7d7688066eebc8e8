"""Attention written out as matmul, softmax, matmul: what the reference models share.

Deliberately not `scaled_dot_product_attention`: this is the form in which models written by hand
reach the compiler. Formula: Vaswani et al. 2017, eq. 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(q_BHSD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, hidden_mask: Tensor) -> Tensor:
    """Softmax attention `[B, H, S, D]`.

    hidden_mask: bool, broadcastable to `[B, H, S, T]`; True where a query must not look. A query
        that may look nowhere averages all values.
    """
    scale = q_BHSD.shape[-1] ** -0.5
    scores_BHST = torch.matmul(q_BHSD, k_BHTD.transpose(-2, -1)) * scale
    # The lowest finite number, not -inf: a fully hidden row must not become NaN.
    lowest = torch.finfo(scores_BHST.dtype).min
    probs_BHST = torch.softmax(scores_BHST.masked_fill(hidden_mask, lowest), dim=-1)
    return torch.matmul(probs_BHST, v_BHTD)


def split_heads(x_BSE: Tensor, heads: int) -> Tensor:
    """`[B, S, H*D]` -> `[B, H, S, D]`."""
    batch, length, width = x_BSE.shape
    return x_BSE.view(batch, length, heads, width // heads).transpose(1, 2)


def merge_heads(x_BHSD: Tensor) -> Tensor:
    """`[B, H, S, D]` -> `[B, S, H*D]`."""
    return x_BHSD.transpose(1, 2).flatten(2)


def causal_mask(positions_S: Tensor) -> Tensor:
    """Bool `[S, S]`: True where key position t lies after query position s."""
    return positions_S[None, :] > positions_S[:, None]
