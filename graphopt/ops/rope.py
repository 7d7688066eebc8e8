"""graphopt::rope: rotary position embedding of query or key heads.

Rotate-half style (Llama), R = width of cos/sin, R <= D:

    x1, x2 = x[..., :R/2], x[..., R/2:R]
    y = cat(x1 * cos1 - x2 * sin1,  x2 * cos2 + x1 * sin2,  x[..., R:])

`cos_BSR`/`sin_BSR` hold both halves. Source: Su et al. 2021, arXiv 2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ops.registry import Cost, define, nbytes

SCHEMA = "rope(Tensor x_BHSD, Tensor cos_BSR, Tensor sin_BSR) -> Tensor"


def reference(x_BHSD: Tensor, cos_BSR: Tensor, sin_BSR: Tensor) -> Tensor:
    """cos and sin are shared by all heads; their batch axis may be 1."""
    width = cos_BSR.shape[-1]
    turned, kept = x_BHSD[..., :width], x_BHSD[..., width:]
    first, second = turned.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    y = turned * cos_BSR[:, None] + rotated * sin_BSR[:, None]
    return torch.cat([y, kept], dim=-1) if kept.shape[-1] else y.contiguous()


def fake(x_BHSD: Tensor, cos_BSR: Tensor, sin_BSR: Tensor) -> Tensor:
    """Like x, in the dtype torch's promotion gives, contiguous."""
    dtype = torch.promote_types(x_BHSD.dtype, cos_BSR.dtype)
    return x_BHSD.new_empty(x_BHSD.shape, dtype=dtype)


def cost(x_BHSD: Tensor, cos_BSR: Tensor, sin_BSR: Tensor) -> Cost:
    """Two products and a sum an element."""
    return Cost(3.0 * x_BHSD.numel(), 2.0 * nbytes(x_BHSD) + nbytes(cos_BSR, sin_BSR))


SPEC = define(SCHEMA, reference=reference, fake=fake, cost=cost)
