"""graphopt::geglu: `gelu(gate) * up`, exact (erf) or tanh-approximated gelu.

Source: Shazeer 2020, arXiv 2002.05202.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from graphopt.ir.opset import Cost, define, nbytes
from graphopt.ops import operands

SCHEMA = 'geglu(Tensor gate, Tensor up, *, str approximate="none") -> Tensor'


def reference(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """`approximate`: "none" or "tanh", as in torch."""
    return F.gelu(gate, approximate=approximate) * up


def fake(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """Like gate, contiguous."""
    operands.floats(gate=gate, up=up)
    operands.require(gate.dtype == up.dtype, f"gate is {gate.dtype}, up is {up.dtype}")
    operands.sizes("up", up, *gate.shape)
    operands.require(approximate in ("none", "tanh"), f"approximate={approximate!r} is no gelu")
    return gate.new_empty(gate.shape)


def cost(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Cost:
    """About ten operations an element."""
    return Cost(10.0 * gate.numel(), 3.0 * nbytes(gate))


SPEC = define(SCHEMA, reference=reference, fake=fake, cost=cost, rows="pointwise")
