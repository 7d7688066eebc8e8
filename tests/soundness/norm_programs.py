"""One norm, described choice by choice; see `mutations.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from mutations import Mutation, words
from torch import Tensor, nn

WIDTH = 32


@dataclass(frozen=True, slots=True)
class Norm:
    """Choices; the defaults are x * rsqrt(mean(x^2, -1) + eps) * weight."""

    operand: str = "plain"
    centre: str = "none"
    square: str = "pow"
    mean: str = "mean"
    axis: tuple[int, ...] = (-1,)
    eps: float = 1e-5
    eps_place: str = "inside"
    root: str = "rsqrt"
    scaled: str = "plain"
    weight: str = "plain"
    bias: str = "none"
    second_user: str = "none"

    def build(self) -> nn.Module:
        """The module."""
        return NormProgram(self)


class NormProgram(nn.Module):
    """The norm of x[0] `[B, S, 32]`; returns the same shape."""

    def __init__(self, choices: Norm) -> None:
        super().__init__()
        self.choices = choices
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("eps", torch.tensor([choices.eps, choices.eps])[:1])

    def forward(self, x: Tensor, pad_BS: Tensor) -> Tensor:
        """See the class."""
        c = self.choices
        own, other = self.operands(x)
        if c.root == "aten":
            return self.of_torch(own)
        centred = self.centred(own)
        statistics = other if c.operand == "other-tensor" else centred
        variance = self.mean(self.squared(statistics), statistics)
        factor, divides = self.root(self.with_epsilon(variance))
        if c.eps_place == "outside":
            factor = factor + c.eps
        out = self.scaled(centred, own, factor, divides)
        normalised = out
        out = self.biased(self.weighted(out))
        if c.second_user == "variance":
            out = out + variance
        elif c.second_user == "factor":
            out = out * factor
        elif c.second_user == "normalised":
            out = out + normalised
        elif c.second_user == "x":
            out = out + own
        elif c.second_user == "centred":
            out = out + centred
        return out

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(what is normalised, another tensor)."""
        how, own = self.choices.operand, x[0]
        if how == "strided":
            return own.transpose(0, 1).contiguous().transpose(0, 1), x[1]
        if how == "half-columns":
            return own[..., : WIDTH // 2].repeat(1, 1, 2), x[1]
        if how == "doubled":
            return own * 2.0, x[1]
        if how == "double":
            return own.double(), x[1]
        if how == "in-place":
            return own.clone().add_(0.1), x[1]
        if how == "shifted":
            return own + 1.0, x[1]
        if how == "transposed":
            return own.transpose(0, 1), x[1]
        return own, x[1]

    def of_torch(self, x: Tensor) -> Tensor:
        """torch's own norms."""
        c = self.choices
        weight = None if c.weight == "none" else self.weight
        if c.operand == "several-axes":
            weight = self.weight[None].expand(x.shape[1], -1)
            return F.layer_norm(x, [x.shape[1], WIDTH], weight, None, c.eps)
        if c.operand == "groups":
            return F.group_norm(x.transpose(1, 2), 4, self.weight, self.bias, c.eps)
        if c.centre == "none":
            eps = None if c.eps_place == "default" else c.eps
            return self.biased(F.rms_norm(x, [WIDTH], weight, eps))
        bias = self.bias if c.bias == "plain" else None
        return F.layer_norm(x, [WIDTH], weight, bias, c.eps)

    def centred(self, x: Tensor) -> Tensor:
        """x less its mean, or something like it."""
        how = self.choices.centre
        if how == "plain":
            return x - x.mean(-1, keepdim=True)
        if how == "sum":
            return x - x.sum(-1, keepdim=True) / WIDTH
        if how == "other-axis":
            return x - x.mean(1, keepdim=True)
        if how == "whole":
            return x - x.mean()
        if how == "added":
            return x + x.mean(-1, keepdim=True)
        if how == "half":
            return x - 0.5 * x.mean(-1, keepdim=True)
        if how == "alpha":
            return torch.sub(x, x.mean(-1, keepdim=True), alpha=2)
        if how == "median":
            return x - x.median(-1, keepdim=True).values
        if how == "swapped":
            return x.mean(-1, keepdim=True) - x
        if how == "twice":
            once = x - x.mean(-1, keepdim=True)
            return once - once.mean(-1, keepdim=True)
        return x

    def squared(self, x: Tensor) -> Tensor:
        """x^2, or something like it."""
        how = self.choices.square
        if how == "mul":
            return x * x
        if how == "square":
            return torch.square(x)
        if how == "abs":
            return x.abs()
        if how == "abs-square":
            return x.abs().square()
        if how == "cube":
            return x.pow(3).abs()
        if how == "power-float":
            return x.pow(2.0)
        if how == "power-near-two":
            return x.abs().pow(2.001)
        if how == "mul-other":
            return x * torch.roll(x, 1, -1)
        return x.pow(2)

    def mean(self, square: Tensor, x: Tensor) -> Tensor:
        """The mean of the squares, or something like it."""
        c, axes = self.choices, list(self.choices.axis)
        if c.mean == "sum":
            return square.sum(axes, keepdim=True)
        if c.mean == "sum-divided":
            return square.sum(axes, keepdim=True) / WIDTH
        if c.mean == "sum-less-one":
            return square.sum(axes, keepdim=True) / (WIDTH - 1)
        if c.mean == "median":
            return square.median(-1, keepdim=True).values
        if c.mean == "peak":
            return square.amax(axes, keepdim=True)
        if c.mean == "double":
            return square.mean(axes, keepdim=True, dtype=torch.float64).float()
        if c.mean == "unsqueezed":
            return square.mean(axes).unsqueeze(axes[0])
        if c.mean == "halved":
            return square.mean(axes, keepdim=True) * 0.5
        if c.mean == "half-columns":
            return square[..., : WIDTH // 2].mean(axes, keepdim=True)
        if c.mean == "var":
            return x.var(axes, unbiased=False, keepdim=True)
        if c.mean == "var-unbiased":
            return x.var(axes, keepdim=True)
        if c.mean == "var-correction":
            return torch.var(x, axes, correction=2, keepdim=True)
        if c.mean == "std":
            return x.std(axes, unbiased=False, keepdim=True).square()
        if c.mean == "norm":
            return torch.linalg.vector_norm(x, dim=axes, keepdim=True).square() / WIDTH
        return square.mean(axes, keepdim=True)

    def with_epsilon(self, variance: Tensor) -> Tensor:
        """Under the root."""
        c = self.choices
        if c.eps_place in ("none", "outside"):
            return variance
        if c.eps_place == "tensor":
            return variance + self.eps
        if c.eps_place == "clamp":
            return variance.clamp(min=c.eps)
        if c.eps_place == "subtracted":
            return variance - (-c.eps)
        if c.eps_place == "minus":
            return (variance - c.eps).abs()
        if c.eps_place == "alpha":
            return torch.add(variance, c.eps, alpha=2)
        if c.eps_place == "first":
            return c.eps + variance
        if c.eps_place == "twice":
            return variance + c.eps + c.eps
        if c.eps_place == "times":
            return variance * (1.0 + c.eps)
        if c.eps_place == "by-data":
            return variance + variance.mean()
        if c.eps_place == "in-place":
            return variance.add_(c.eps)
        return variance + c.eps

    def root(self, total: Tensor) -> tuple[Tensor, bool]:
        """(the factor, whether x is divided by it)."""
        how = self.choices.root
        if how == "sqrt":
            return total.sqrt(), True
        if how == "sqrt-reciprocal":
            return total.sqrt().reciprocal(), False
        if how == "one-over-sqrt":
            return 1.0 / total.sqrt(), False
        if how == "power":
            return total.pow(-0.5), False
        if how == "power-divides":
            return total**0.5, True
        if how == "third":
            return total.pow(-0.33), False
        if how == "fourth":
            return total.sqrt().rsqrt(), False
        if how == "reciprocal":
            return total.reciprocal(), False
        if how == "rsqrt-divides":
            return total.rsqrt(), True
        if how == "sqrt-times":
            return total.sqrt(), False
        if how == "rsqrt-bfloat16":
            return total.rsqrt().to(torch.bfloat16), False
        if how == "rsqrt-negative":
            return -total.rsqrt(), False
        if how == "exp-log":
            return torch.exp(-0.5 * torch.log(total)), False
        return total.rsqrt(), False

    def scaled(self, centred: Tensor, own: Tensor, factor: Tensor, divides: bool) -> Tensor:
        """x times the factor, or divided by it."""
        how = self.choices.scaled
        if how == "uncentred":
            centred = own
        if how == "swapped":
            return factor / centred if divides else factor * centred
        if how == "squared":
            return centred * centred * factor
        if how == "added":
            return centred + factor
        if how == "in-place":
            return centred.clone().div_(factor) if divides else centred.clone().mul_(factor)
        if how == "rounded":
            return (centred / factor if divides else centred * factor).to(torch.bfloat16).float()
        return centred / factor if divides else centred * factor

    def weighted(self, x: Tensor) -> Tensor:
        """The weight, or something like it."""
        how = self.choices.weight
        if how == "none":
            return x
        if how == "swapped":
            return self.weight * x
        if how == "one-plus":
            return x * (1.0 + self.weight)
        if how == "plus-two":
            return x * (self.weight + 2.0)
        if how == "minus-one":
            return x * (self.weight - 1.0)
        if how == "one-minus":
            return x * (1.0 - self.weight)
        if how == "alpha":
            return x * torch.add(self.weight, 1.0, alpha=2)
        if how == "doubled":
            return x * (2.0 * self.weight)
        if how == "divided":
            return x / self.weight
        if how == "flipped":
            return x * self.weight.flip(0)
        if how == "one-element":
            return x * self.weight[:1]
        if how == "two-axes":
            return x * self.weight[None]
        if how == "added":
            return x + self.weight
        if how == "rows":
            return x * self.weight[: x.shape[1], None]
        if how == "double":
            return x * self.weight.double()
        if how == "rounded":
            return x * self.weight.to(torch.bfloat16)
        if how == "twice":
            return x * self.weight * self.weight
        if how == "data":
            return x * x.amax(-1, keepdim=True)
        return x * self.weight

    def biased(self, x: Tensor) -> Tensor:
        """The bias, or something like it."""
        how = self.choices.bias
        if how == "plain":
            return x + self.bias
        if how == "subtracted":
            return x - self.bias
        if how == "alpha":
            return torch.add(x, self.bias, alpha=2)
        if how == "number":
            return x + 0.5
        if how == "one-element":
            return x + self.bias[:1]
        if how == "twice":
            return x + self.bias + self.bias
        if how == "double":
            return x + self.bias.double()
        if how == "in-place":
            return x.add_(self.bias)
        if how == "weight-again":
            return x + self.weight
        return x


RMS = Norm()
LAYER = Norm(centre="plain", bias="plain")
BASES = {
    "rms": RMS,
    "rms by sqrt": replace(RMS, root="sqrt", square="mul"),
    "rms with 1 + w": replace(RMS, weight="one-plus", square="square"),
    "layer norm": LAYER,
    "layer norm by var": replace(LAYER, mean="var", root="sqrt"),
    "torch's rms_norm": replace(RMS, root="aten"),
    "torch's layer_norm": replace(LAYER, root="aten"),
}


def by_hand(c: Norm) -> bool:
    """Not one of torch's norms."""
    return c.root != "aten"


def plain(c: Norm) -> bool:
    """One base of each norm."""
    return c in (RMS, LAYER)


def layer_by_mean(c: Norm) -> bool:
    """The layer norm of two means."""
    return c == LAYER


SQUARES = words(
    """
    mul square abs abs-square cube power-float power-near-two mul-other
    """
)
MEANS = words(
    """
    sum sum-divided sum-less-one median peak double unsqueezed halved half-columns var
    var-unbiased var-correction std norm
    """
)
EPSILONS = words(
    """
    outside none tensor clamp subtracted minus alpha first twice times by-data in-place
    """
)
ROOTS = words(
    """
    sqrt sqrt-reciprocal one-over-sqrt power power-divides third fourth reciprocal rsqrt-divides
    sqrt-times rsqrt-bfloat16 rsqrt-negative exp-log
    """
)
WEIGHTS = words(
    """
    none swapped one-plus plus-two minus-one one-minus alpha doubled divided flipped one-element
    two-axes added rows double rounded twice data
    """
)
BIASES = words(
    """
    plain subtracted alpha number one-element twice double in-place weight-again
    """
)
CENTRES = words(
    """
    sum other-axis whole added half alpha median swapped twice none
    """
)
OPERANDS = words(
    """
    strided half-columns doubled double in-place shifted transposed
    """
)

MUTATIONS = (
    Mutation("axis", ((-2,), (-2, -1)), by_hand),
    Mutation("axis", ((0,),), plain),
    Mutation("square", SQUARES, lambda c: c == RMS),
    Mutation("square", ("abs", "cube", "mul-other"), lambda c: c == LAYER),
    Mutation("mean", MEANS, lambda c: c == RMS),
    Mutation("mean", ("sum",), by_hand),
    Mutation("mean", ("norm", "var", "std", "var-unbiased"), lambda c: c == LAYER),
    Mutation("eps", (0.1, 0.0)),
    Mutation(
        "eps_place", EPSILONS, lambda c: c == RMS or (c.root == "sqrt" and c.centre == "none")
    ),
    Mutation("root", ROOTS, lambda c: c == RMS),
    Mutation("root", ("power-divides", "one-over-sqrt", "third", "sqrt-times"), layer_by_mean),
    Mutation("weight", WEIGHTS, lambda c: c == RMS),
    Mutation("weight", ("none", "one-plus", "alpha", "flipped", "one-element"), layer_by_mean),
    Mutation("weight", ("alpha", "one-minus", "double"), lambda c: c.weight == "one-plus"),
    Mutation("weight", ("none",), lambda c: not by_hand(c)),
    Mutation("bias", BIASES, plain),
    Mutation("bias", ("alpha",), by_hand),
    Mutation("centre", CENTRES, layer_by_mean),
    Mutation("centre", ("other-axis", "half", "none"), lambda c: c.mean == "var"),
    Mutation("centre", ("plain", "other-axis"), lambda c: c.centre == "none" and by_hand(c)),
    Mutation("operand", OPERANDS, lambda c: c == RMS),
    Mutation("operand", ("strided", "transposed"), lambda c: not by_hand(c)),
    Mutation("operand", ("other-tensor",), by_hand),
    Mutation("operand", ("several-axes",), lambda c: c.root == "aten" and c.centre == "plain"),
    Mutation("eps_place", ("default",), lambda c: c.root == "aten" and c.centre == "none"),
    Mutation("scaled", ("uncentred",), lambda c: c.centre == "plain" and by_hand(c)),
    Mutation("scaled", ("swapped", "squared", "added", "in-place", "rounded"), plain),
    Mutation("scaled", ("added",), by_hand),
    Mutation("second_user", ("variance", "factor", "normalised", "x"), plain),
    Mutation("second_user", ("factor",), by_hand),
    Mutation("second_user", ("centred",), lambda c: c.centre == "plain" and by_hand(c)),
)
