"""graphopt::rms_norm: root-mean-square normalisation over the last axis.

    y = x / sqrt(mean(x^2) + eps) * (weight_offset + weight)

computed in float32. `cast_first` says which of two spellings the model uses when x is bf16/fp16:
true (Llama): the normalised x is rounded to x's dtype, then multiplied by the weight; false
(Gemma): multiplied in float32, then rounded. Source: Zhang & Sennrich 2019, arXiv 1910.07467.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ir.opset import Cost, define, nbytes
from graphopt.ops import operands

SCHEMA = (
    "rms_norm(Tensor x, Tensor? weight_D=None, *, float eps, float weight_offset=0.0, "
    "bool cast_first=True) -> Tensor"
)


def reference(
    x: Tensor,
    weight_D: Tensor | None = None,
    *,
    eps: float,
    weight_offset: float = 0.0,
    cast_first: bool = True,
) -> Tensor:
    """The definition above, in the same order of operations as the models."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight_D is None:
        return normed.to(x.dtype)
    if cast_first:
        weight = weight_D if weight_offset == 0.0 else weight_D + weight_offset
        return (weight * normed.to(x.dtype)).to(x.dtype)
    return (normed * (weight_D.to(wide.dtype) + weight_offset)).to(x.dtype)


def fake(
    x: Tensor,
    weight_D: Tensor | None = None,
    *,
    eps: float,
    weight_offset: float = 0.0,
    cast_first: bool = True,
) -> Tensor:
    """Like x, contiguous."""
    operands.require(x.ndim > 0, "x has no axis")
    operands.floats(x=x, weight_D=weight_D)
    if weight_D is not None:
        operands.broadcast("weight_D", weight_D, x.shape[-1])
    operands.finite(eps=eps, weight_offset=weight_offset)
    return x.new_empty(x.shape)


def cost(x: Tensor, weight_D: Tensor | None = None, **_: object) -> Cost:
    """Four operations an element; x read and written once."""
    return Cost(4.0 * x.numel(), 2.0 * nbytes(x) + nbytes(weight_D))


SPEC = define(SCHEMA, reference=reference, fake=fake, cost=cost)
