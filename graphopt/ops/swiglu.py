"""graphopt::swiglu: `silu(gate) * up`. Source: Shazeer 2020, arXiv 2002.05202."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from graphopt.ir.opset import Cost, define, nbytes
from graphopt.ops import operands

SCHEMA = "swiglu(Tensor gate, Tensor up) -> Tensor"


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """Same shape and dtype for both."""
    return F.silu(gate) * up


def fake(gate: Tensor, up: Tensor) -> Tensor:
    """Like gate, contiguous."""
    operands.floats(gate=gate, up=up)
    operands.require(gate.dtype == up.dtype, f"gate is {gate.dtype}, up is {up.dtype}")
    operands.sizes("up", up, *gate.shape)
    return gate.new_empty(gate.shape)


def cost(gate: Tensor, up: Tensor) -> Cost:
    """About six operations an element, the exponential counted as four."""
    return Cost(6.0 * gate.numel(), 3.0 * nbytes(gate))


SPEC = define(SCHEMA, reference=reference, fake=fake, cost=cost, rows="pointwise")
