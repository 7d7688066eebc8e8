"""graphopt::layer_norm: normalisation to mean 0 and variance 1 over the last axis.

    y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias

computed in float32 (float64 for float64) and rounded once to x's dtype. Source: Ba et al. 2016,
arXiv 1607.06450.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.ir.opset import Cost, define, nbytes
from graphopt.ops import operands

SCHEMA = "layer_norm(Tensor x, Tensor? weight_D=None, Tensor? bias_D=None, *, float eps) -> Tensor"


def reference(
    x: Tensor, weight_D: Tensor | None = None, bias_D: Tensor | None = None, *, eps: float
) -> Tensor:
    """The definition above; without a weight it is 1, without a bias 0."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if t is None else t.to(wide) for t in (weight_D, bias_D))
    return F.layer_norm(x.to(wide), (x.shape[-1],), weight, bias, eps).to(x.dtype)


def fake(
    x: Tensor, weight_D: Tensor | None = None, bias_D: Tensor | None = None, *, eps: float
) -> Tensor:
    """Like x, contiguous."""
    operands.require(x.ndim > 0, "x has no axis")
    operands.floats(x=x, weight_D=weight_D, bias_D=bias_D)
    for name, vector in (("weight_D", weight_D), ("bias_D", bias_D)):
        if vector is not None:
            operands.sizes(name, vector, x.shape[-1])
    operands.finite(eps=eps)
    return x.new_empty(x.shape)


def cost(
    x: Tensor, weight_D: Tensor | None = None, bias_D: Tensor | None = None, **_: float
) -> Cost:
    """Seven operations an element; x read and written once."""
    return Cost(7.0 * x.numel(), 2.0 * nbytes(x) + nbytes(weight_D, bias_D))


SPEC = define(SCHEMA, reference=reference, fake=fake, cost=cost)
