"""One gated activation, described choice by choice; see `mutations.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from mutations import Mutation, words
from torch import Tensor, nn

SQRT_TWO_OVER_PI = math.sqrt(2 / math.pi)


@dataclass(frozen=True, slots=True)
class Gated:
    """Choices; the defaults are silu(gate) * up with two projections."""

    parts: str = "two"
    activation: str = "silu"
    cubic: float = 0.044715
    outer: float = SQRT_TWO_OVER_PI
    root: float = math.sqrt(2.0)
    half: float = 0.5
    one: float = 1.0
    power: int = 3
    beta: float = 1.0
    product: str = "plain"
    second_user: str = "none"

    def build(self) -> nn.Module:
        """The module."""
        return GatedProgram(self)


class GatedProgram(nn.Module):
    """x[0] and x[1] `[B, S, 32]` as gate and up; returns `[B, S, 32]` or half of it."""

    def __init__(self, choices: Gated) -> None:
        super().__init__()
        self.choices = choices
        self.weight = nn.Parameter(torch.rand(32) + 0.5)

    def forward(self, x: Tensor, pad_BS: Tensor) -> Tensor:
        """See the class."""
        gate, up = self.gate_and_up(x)
        value = self.activated(gate, up)
        out = self.multiplied(value, gate, up)
        how = self.choices.second_user
        if how == "activation":
            out = out + value
        elif how == "activation-mean":
            out = out * value.mean(-1, keepdim=True)
        elif how == "gate":
            out = out + gate
        elif how == "up":
            out = out + up
        return out

    def gate_and_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors, or two parts of one."""
        how, a, b = self.choices.parts, x[0], x[1]
        if how == "chunks":
            gate, up = a.chunk(2, -1)
            return gate, up
        if how == "chunks-swapped":
            up, gate = a.chunk(2, -1)
            return gate, up
        if how == "interleaved":
            return a[..., ::2], a[..., 1::2]
        if how == "same":
            return a, a
        if how == "up-rolled":
            return a, torch.roll(b, 1, 1)
        if how == "up-one-column":
            return a, b[..., :1]
        if how == "gate-one-column":
            return a[..., :1], b
        if how == "up-of-weight":
            return a, self.weight
        if how == "up-double":
            return a, b.double()
        if how == "gate-double":
            return a.double(), b
        if how == "up-rounded":
            return a, b.to(torch.bfloat16)
        if how == "strided":
            return a.transpose(0, 1).contiguous().transpose(0, 1), b
        if how == "overlapping":
            return a[..., :20], a[..., 12:]
        if how == "clamped":
            return a.clamp(max=1.0), b.clamp(-1.0, 1.0)
        if how == "up-plus-one":
            return a, b + 1.0
        return a, b

    def activated(self, x: Tensor, up: Tensor) -> Tensor:
        """The activation, or something like it."""
        c = self.choices
        if c.activation == "gelu":
            return F.gelu(x)
        if c.activation == "tanh":
            return F.gelu(x, approximate="tanh")
        if c.activation == "silu-in-place":
            return F.silu(x.clone(), inplace=True)
        if c.activation == "sigmoid":
            return x * torch.sigmoid(c.beta * x) if c.beta != 1.0 else x * torch.sigmoid(x)
        if c.activation == "sigmoid-of-up":
            return x * torch.sigmoid(up)
        if c.activation == "sigmoid-shifted":
            return x * torch.sigmoid(x + 0.1)
        if c.activation == "sigmoid-negative":
            return x * torch.sigmoid(-x)
        if c.activation == "sigmoid-added":
            return x + torch.sigmoid(x)
        if c.activation == "sigmoid-exp":
            return x / (1.0 + torch.exp(-x))
        if c.activation == "sigmoid-exp-sign":
            return x / (1.0 + torch.exp(x))
        if c.activation == "sigmoid-exp-two":
            return x / (2.0 + torch.exp(-x))
        if c.activation == "sigmoid-exp-reciprocal":
            return x * (1.0 + torch.exp(-x)).reciprocal()
        if c.activation == "sigmoid-exp-product":
            return x * (1.0 / (torch.exp(-x) + 1.0))
        if c.activation == "sigmoid-exp2":
            return x / (1.0 + torch.exp2(-x * math.log2(math.e)))
        if c.activation == "sigmoid-exp2-unscaled":
            return x * (1.0 / (1.0 + torch.exp2(-x)))
        if c.activation == "sigmoid-tanh":
            return x * 0.5 * (1.0 + torch.tanh(x * 0.5))
        if c.activation == "hard":
            return x * F.hardsigmoid(x)
        if c.activation == "erf":
            return c.half * x * (c.one + torch.erf(x / c.root))
        if c.activation == "erf-minus":
            return c.half * x * (c.one - torch.erf(x / c.root))
        if c.activation == "erf-of-up":
            return c.half * x * (c.one + torch.erf(up / c.root))
        if c.activation == "erf-times-up":
            return c.half * up * (c.one + torch.erf(x / c.root))
        if c.activation == "erf-alpha":
            return c.half * x * torch.add(torch.erf(x / c.root), c.one, alpha=2)
        if c.activation == "erfc":
            return c.half * x * torch.erfc(-x / c.root)
        if c.activation == "by-tanh":
            cubic = c.cubic * torch.pow(x, c.power)
            return c.half * x * (c.one + torch.tanh(c.outer * (x + cubic)))
        if c.activation == "by-tanh-minus":
            cubic = c.cubic * torch.pow(x, c.power)
            return c.half * x * (c.one + torch.tanh(c.outer * (x - cubic)))
        if c.activation == "by-tanh-of-up":
            cubic = c.cubic * torch.pow(up, c.power)
            return c.half * x * (c.one + torch.tanh(c.outer * (x + cubic)))
        if c.activation == "by-tanh-alpha":
            return c.half * x * (c.one + torch.tanh(c.outer * torch.add(x, x**3, alpha=c.cubic)))
        if c.activation == "by-tanh-factored":
            inner = c.outer * x * (c.one + c.cubic * x * x)
            return c.half * x * (1.0 + torch.tanh(inner))
        if c.activation == "by-tanh-outside":
            inner = c.outer * x + c.cubic * torch.pow(x, c.power)
            return c.half * x * (c.one + torch.tanh(inner))
        return F.silu(x)

    def multiplied(self, value: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        """value * up, or something like it."""
        how = self.choices.product
        if how == "swapped":
            return up * value
        if how == "added":
            return value + up
        if how == "divided":
            return value / up
        if how == "by-number":
            return value * 2.0
        if how == "doubled":
            return value * up * 2.0
        if how == "squared":
            return value * value
        if how == "negative":
            return value * -up
        if how == "rounded-before":
            return value.to(torch.bfloat16).float() * up
        if how == "rounded-after":
            return (value * up).to(torch.bfloat16)
        if how == "in-place":
            return value.mul_(up)
        if how == "gate-again":
            return value * gate
        if how == "activated-both":
            return value * F.silu(up)
        if how == "summed":
            return (value * up).cumsum(1)
        if how == "addcmul":
            return torch.addcmul(gate, value, up)
        if how == "weighted":
            return value * self.weight[: value.shape[-1]]
        return value * up


SILU = Gated()
BY_TANH = replace(SILU, activation="by-tanh")
BASES = {
    "silu": SILU,
    "x * sigmoid(x)": replace(SILU, activation="sigmoid"),
    "gelu": replace(SILU, activation="gelu"),
    "gelu by erf": replace(SILU, activation="erf"),
    "gelu by tanh": BY_TANH,
    "gelu by tanh, factored": replace(SILU, activation="by-tanh-factored"),
    "chunks of one projection": replace(SILU, parts="chunks"),
}
PARTS = words(
    """
    chunks-swapped interleaved same up-rolled up-one-column gate-one-column up-of-weight up-double
    gate-double up-rounded strided overlapping clamped up-plus-one
    """
)
PRODUCTS = words(
    """
    swapped added divided by-number doubled squared negative rounded-before rounded-after in-place
    gate-again activated-both summed addcmul weighted
    """
)
SIGMOIDS = words(
    """
    sigmoid-of-up sigmoid-shifted sigmoid-negative sigmoid-added sigmoid-exp sigmoid-exp-sign
    sigmoid-exp-two sigmoid-exp-reciprocal sigmoid-exp-product sigmoid-exp2 sigmoid-exp2-unscaled
    sigmoid-tanh hard
    """
)
ERFS = ("erf-minus", "erf-of-up", "erf-times-up", "erf-alpha", "erfc")
TANHS = words(
    """
    by-tanh-minus by-tanh-of-up by-tanh-alpha by-tanh-outside
    """
)


def from_erf(c: Gated) -> bool:
    """gelu spelled with erf."""
    return c.activation == "erf"


def from_tanh(c: Gated) -> bool:
    """gelu spelled with tanh."""
    return c.activation.startswith("by-tanh")


MUTATIONS = (
    Mutation("parts", PARTS, lambda c: c == SILU),
    Mutation("parts", ("up-one-column",), lambda c: c.parts == "two"),
    Mutation("parts", ("chunks-swapped", "overlapping"), lambda c: c.parts == "chunks"),
    Mutation("product", PRODUCTS, lambda c: c == SILU),
    Mutation("product", ("by-number", "rounded-before", "squared")),
    Mutation("second_user", ("activation",)),
    Mutation("second_user", ("activation-mean", "gate", "up"), lambda c: c == SILU),
    Mutation("activation", ("silu-in-place", "tanh", "gelu"), lambda c: c == SILU),
    Mutation("activation", SIGMOIDS, lambda c: c.activation == "sigmoid"),
    Mutation("beta", (1.702, -1.0, 1.0001, 2.0), lambda c: c.activation == "sigmoid"),
    Mutation("activation", ERFS, from_erf),
    Mutation("activation", TANHS, from_tanh),
    Mutation("half", (0.5 + 1e-9, 0.50004, 0.51, 1.0, -0.5), lambda c: from_erf(c) or from_tanh(c)),
    Mutation("one", (1.0 + 1e-7, 1.00005, 1.1, -1.0), lambda c: from_erf(c) or from_tanh(c)),
    Mutation("root", (1.41421, 1.4142, 1.414, 1.4, 2.0, -math.sqrt(2.0)), from_erf),
    Mutation("cubic", (0.04471, 0.044715001, 0.0447, 0.045, 0.05, 0.0, -0.044715), from_tanh),
    Mutation("outer", (0.7978845608, 0.79788, 0.7979, 0.798, 0.8, 1.0), from_tanh),
    Mutation("power", (2, 4), lambda c: c == BY_TANH),
)
