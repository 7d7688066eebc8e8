"""fuse_norm: spellings of RMS and layer norms, look-alikes with their codes, values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fuse_block import WIDTH, Function, fuse
from torch import Tensor, nn

from graphopt.testing import GoldenGraph

FLOATS = [torch.float32, torch.bfloat16]


def factor(x: Tensor, eps: float = 1e-5) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def llama(x: Tensor, w: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    return w * (wide * factor(wide)).to(x.dtype)


def gemma(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return ((wide * factor(wide)) * (1.0 + w.float())).type_as(x)


def olmo2(x: Tensor, w: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    return (w * (wide * factor(wide))).to(x.dtype)


def t5(x: Tensor, w: Tensor) -> Tensor:
    """The mean is taken in float32, x itself is not widened."""
    return w * (x * factor(x.float())).to(x.dtype)


def square_root(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return (wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * w


def negative_power(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + 1e-5) ** -0.5).to(x.dtype) * w


def power(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return (wide / (wide.square().mean(-1, keepdim=True) + 1e-5) ** 0.5).to(x.dtype) * w


def one_over_root(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return (1.0 / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * wide).to(x.dtype) * w


def axis_by_number(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    mean = wide.pow(2).mean((2,), keepdim=True)
    return (torch.rsqrt(mean + 1e-5) * wide).to(x.dtype) * w


def all_in_one_dtype(x: Tensor, w: Tensor) -> Tensor:
    return x * factor(x) * w


def atens_own(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), w, 1e-5)


def atens_epsilon(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), w)


RMS = [
    llama,
    gemma,
    olmo2,
    t5,
    square_root,
    negative_power,
    power,
    one_over_root,
    axis_by_number,
    all_in_one_dtype,
    atens_own,
    atens_epsilon,
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm", RMS)
def test_rms_norm_is_one_op(norm: Function, dtype: torch.dtype) -> None:
    fused = fuse(norm, "fuse_norm", dtype)
    assert fused.codes == []
    assert fused.ops == {"graphopt.rms_norm": 1}


@pytest.mark.parametrize(("norm", "cast_first"), [(llama, True), (gemma, False), (olmo2, False)])
def test_the_cast_order_is_kept(norm: Function, cast_first: bool) -> None:
    (call,) = [
        n for n in fuse(norm, "fuse_norm", torch.bfloat16).graph.nodes if "rms_norm" in n.name
    ]
    assert call.kwargs["cast_first"] is cast_first


def float_weight(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return (w * (wide * factor(wide)).to(x.dtype)).to(x.dtype)


@pytest.mark.parametrize("norm", [float_weight, olmo2])
def test_float32_weight_of_a_bfloat16_norm(norm: Function) -> None:
    fused = fuse(norm, "fuse_norm", torch.bfloat16, weight_dtype=torch.float32)
    assert fused.ops == {"graphopt.rms_norm": 1}


def test_float32_weight_without_a_cast_back_stays_outside() -> None:
    fused = fuse(llama, "fuse_norm", torch.bfloat16, weight_dtype=torch.float32)
    assert fused.ops == {"graphopt.rms_norm": 1, "aten.mul.Tensor": 1}


def test_a_norm_that_stays_in_float32() -> None:
    def wide(x: Tensor, w: Tensor) -> Tensor:
        x = x.float()
        return x * factor(x) * w

    fused = fuse(wide, "fuse_norm", torch.bfloat16)
    assert fused.ops == {"aten.to.dtype": 1, "graphopt.rms_norm": 1}


class AddedInItsOwnDtype(nn.Module):
    """1 + w rounded to bfloat16, where the op would add in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * factor(wide) * (self.weight + 1.0)).to(x.dtype)


def test_an_offset_added_in_bfloat16() -> None:
    """Folding makes it a weight of its own, which is exact."""
    fused = fuse(AddedInItsOwnDtype(), "fuse_norm", torch.bfloat16)
    assert fused.ops == {"graphopt.rms_norm": 1}


@pytest.mark.parametrize("dtype", FLOATS)
def test_l2_norm_without_a_weight(dtype: torch.dtype) -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        wide = x.float()
        return (wide * factor(wide)).type_as(x) + w

    assert fuse(norm, "fuse_norm", dtype).ops == {"graphopt.rms_norm": 1, "aten.add.Tensor": 1}


@pytest.mark.parametrize("dtype", FLOATS)
def test_qk_norm_over_heads(dtype: torch.dtype) -> None:
    fused = fuse(lambda x, w: llama(x.transpose(1, 2), w), "fuse_norm", dtype, rank=4)
    assert fused.ops == {"aten.transpose.int": 1, "graphopt.rms_norm": 1}


def test_a_weight_of_one_number_is_no_weight() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.5]))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x * factor(x))

    assert fuse(Scaled(), "fuse_norm").ops == {"graphopt.rms_norm": 1, "aten.mul.Tensor": 1}


def test_two_weights_on_one_normalised_value() -> None:
    def twice(x: Tensor, w: Tensor) -> Tensor:
        normed = x * factor(x)
        return normed * w + normed * w.sin()

    fused = fuse(twice, "fuse_norm")
    assert fused.ops["graphopt.rms_norm"] == 1
    assert fused.ops["aten.mul.Tensor"] == 2


def cohere(x: Tensor, w: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    mean = wide.mean(-1, keepdim=True)
    variance = (wide - mean).pow(2).mean(-1, keepdim=True)
    return (w.to(torch.float32) * ((wide - mean) * torch.rsqrt(variance + 1e-5))).to(x.dtype)


def with_var(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    variance = wide.var(-1, unbiased=False, keepdim=True)
    return (centred / torch.sqrt(variance + 1e-5) * w).to(x.dtype)


def with_correction(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    variance = centred.var(-1, correction=0, keepdim=True)
    return (centred * (variance + 1e-5) ** -0.5 * w).to(x.dtype)


def with_bias(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return (w + centred * torch.rsqrt(variance + 1e-5) * w).to(x.dtype)


def atens_layer_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), w, w)


def native_layer_norm(x: Tensor, w: Tensor) -> Tensor:
    return torch.native_layer_norm(x, (WIDTH,), w, None, 1e-5)[0]


def bare_layer_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "norm",
    [
        cohere,
        with_var,
        with_correction,
        with_bias,
        atens_layer_norm,
        native_layer_norm,
        bare_layer_norm,
    ],
)
def test_layer_norm_is_one_op(norm: Function, dtype: torch.dtype) -> None:
    fused = fuse(norm, "fuse_norm", dtype)
    assert fused.codes == []
    assert fused.ops == {"graphopt.layer_norm": 1}


def test_a_layer_norm_rounded_before_its_weight() -> None:
    """The op rounds once, so the weight stays outside."""

    def norm(x: Tensor, w: Tensor) -> Tensor:
        wide = x.float()
        centred = wide - wide.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True)
        return (centred * torch.rsqrt(variance + 1e-5)).to(x.dtype) * w

    fused = fuse(norm, "fuse_norm", torch.bfloat16)
    assert fused.ops == {"graphopt.layer_norm": 1, "aten.mul.Tensor": 1}


def used_variance(x: Tensor, w: Tensor) -> Tensor:
    variance = x.pow(2).mean(-1, keepdim=True)
    return x * torch.rsqrt(variance + 1e-5) * w + variance


def unbiased(x: Tensor, w: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5) * w


def over_batch(x: Tensor, w: Tensor) -> Tensor:
    """A batch norm by hand."""
    variance = x.var((0, 1), unbiased=False, keepdim=True)
    return (x - x.mean((0, 1), keepdim=True)) * torch.rsqrt(variance + 1e-5) * w


def rounded_factor(x: Tensor, w: Tensor) -> Tensor:
    return x * factor(x.float()).to(torch.float64).float() * w


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * w, "mean-axis"),
        (lambda x, w: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1) * w, "mean-axis"),
        (over_batch, "mean-axis"),
        (lambda x, w: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6) * w, "no-square"),
        (lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * w, "no-epsilon"),
        (lambda x, w: x / x.pow(2).mean(-1, keepdim=True).sqrt() * w, "no-epsilon"),
        (lambda x, w: x / x.pow(2).mean(-1, keepdim=True).clamp(1e-6).sqrt(), "no-epsilon"),
        (lambda x, w: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6) * w, "epsilon-outside"),
        (lambda x, w: x * (x.pow(2).mean(-1, keepdim=True).rsqrt() + 1e-6), "epsilon-outside"),
        (lambda x, w: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).reciprocal(), "other-root"),
        (lambda x, w: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).pow(-0.25), "other-root"),
        (lambda x, w: x * torch.rsqrt(x.pow(2).amax(-1, keepdim=True) + 1e-6) * w, "no-mean"),
        (lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + w[:1]), "epsilon-tensor"),
        (lambda x, w: w * factor(x), "factor-used-elsewhere"),
        (lambda x, w: x * factor(x) + factor(x), "factor-used-elsewhere"),
        (lambda x, w: (x - x.mean(-1, keepdim=True)) * factor(x), "factor-used-elsewhere"),
        (
            lambda x, w: torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * x,
            "factor-used-elsewhere",
        ),
        (rounded_factor, "factor-cast"),
        (used_variance, "variance-used-elsewhere"),
        (unbiased, "variance-unbiased"),
        (lambda x, w: F.layer_norm(x, (5, WIDTH)) * w, "several-axes"),
    ],
)
def test_norm_look_alikes(function: Function, code: str) -> None:
    fused = fuse(function, "fuse_norm")
    assert fused.codes == [code]
    assert not any(op.startswith("graphopt.") for op in fused.ops)


@pytest.mark.parametrize(
    ("name", "norm"), [("rms_norm", gemma), ("layer_norm", cohere), ("rms_norm_llama", llama)]
)
def test_golden(golden_graph: GoldenGraph, name: str, norm: Function) -> None:
    golden_graph(fuse(norm, "fuse_norm", torch.bfloat16).graph, name)
