"""fuse_mlp: spellings of gated activations, look-alikes with their codes, values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fuse_block import WIDTH, Function, fuse
from torch import Tensor, nn
from transformers.activations import ACT2FN

from graphopt.testing import GoldenGraph

FLOATS = [torch.float32, torch.bfloat16]
Activation = Callable[[Tensor], Tensor]


def erf_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def erf_gelu_as_distribution(x: Tensor) -> Tensor:
    return x * (0.5 * (1.0 + torch.erf(x * 0.70710678)))


def half_last(x: Tensor) -> Tensor:
    return x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))) / 2.0


ACTIVATIONS = [
    (F.silu, "swiglu", None),
    (lambda x: x * torch.sigmoid(x), "swiglu", None),
    (lambda x: torch.sigmoid(x) * x, "swiglu", None),
    (F.gelu, "geglu", "none"),
    (erf_gelu, "geglu", "none"),
    (erf_gelu_as_distribution, "geglu", "none"),
    (lambda x: F.gelu(x, approximate="tanh"), "geglu", "tanh"),
    (ACT2FN["gelu_pytorch_tanh"], "geglu", "tanh"),
    (ACT2FN["gelu_new"], "geglu", "tanh"),
    (ACT2FN["gelu_fast"], "geglu", "tanh"),
    (ACT2FN["gelu_accurate"], "geglu", "tanh"),
    (half_last, "geglu", "tanh"),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("activation", "op", "approximate"), ACTIVATIONS)
@pytest.mark.parametrize("swapped", [False, True])
def test_gated_activations(
    activation: Activation, op: str, approximate: str | None, swapped: bool, dtype: torch.dtype
) -> None:
    def gated(x: Tensor, w: Tensor) -> Tensor:
        gate, up = x * 2, x + w
        return up * activation(gate) if swapped else activation(gate) * up

    fused = fuse(gated, "fuse_mlp", dtype)
    assert fused.codes == []
    assert fused.ops == {"aten.mul.Tensor": 1, "aten.add.Tensor": 1, f"graphopt.{op}": 1}
    (call,) = [n for n in fused.graph.nodes if n.op == "call_function" and op in str(n.target)]
    assert call.kwargs.get("approximate") == approximate


@pytest.mark.parametrize(
    "product",
    [
        lambda gate, up: gate * (torch.sigmoid(gate) * up),
        lambda gate, up: (up * gate) * torch.sigmoid(gate),
        lambda gate, up: torch.sigmoid(gate) * (gate * up),
    ],
)
def test_products_of_three_in_any_order(product: Function) -> None:
    fused = fuse(lambda x, w: product(x * 2, x + w), "fuse_mlp")
    assert fused.ops == {"aten.mul.Tensor": 1, "aten.add.Tensor": 1, "graphopt.swiglu": 1}


class OneProjection(nn.Module):
    """Gate and up from one linear."""

    def __init__(self, take: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.take = take
        self.gate_up = nn.Linear(WIDTH, 24)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.take(self.gate_up(x))
        return F.silu(gate) * up


@pytest.mark.parametrize(
    "take",
    [
        lambda y: y.chunk(2, -1),
        lambda y: y.split(12, -1),
        lambda y: y.split([12, 12], -1),
        lambda y: (y[..., :12], y[..., 12:]),
        lambda y: (y[..., ::2], y[..., 1::2]),
        lambda y: y.unflatten(-1, (2, 12)).unbind(-2),
    ],
)
def test_gate_and_up_from_one_linear(take: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    fused = fuse(OneProjection(take), "fuse_mlp")
    assert fused.codes == []
    assert fused.ops["graphopt.swiglu"] == fused.ops["aten.linear"] == 1
    assert "aten.silu" not in fused.ops


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (lambda x, w: F.gelu(x) + w, "not-gated"),
        (lambda x, w: F.silu(x) * 2.0, "not-gated"),
        (lambda x, w: F.silu(x) * F.silu(x), "not-gated"),
        (lambda x, w: F.silu(x) * (x + w) + F.silu(x), "not-gated"),
        (lambda x, w: ACT2FN["gelu_new"](x) + w, "not-gated"),
        (lambda x, w: F.silu(x) * w, "gate-shape"),
        (lambda x, w: F.silu(x) * (x + w).double(), "gate-shape"),
        (lambda x, w: F.silu(x).double() * (x + w), "activation-cast"),
        (lambda x, w: ACT2FN["quick_gelu"](x) * (x + w), "quick-gelu"),
        (lambda x, w: torch.sigmoid(x) * (x + w), "not-silu"),
        (lambda x, w: x * (1.0 + torch.erf(x)) * (x + w), "not-gelu"),
        (lambda x, w: 0.5 * x * (1.0 + torch.erf(x * 0.8)) * (x + w), "not-gelu"),
        (lambda x, w: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.05 * x**3))) * (x + w), "not-gelu"),
        (lambda x, w: x * (1.0 + torch.erf(x / 1.4142)) * 0.5 * (x + w), "not-gelu"),
        (lambda x, w: 0.50004 * x * (1.0 + torch.erf(x / 2**0.5)) * (x + w), "not-gelu"),
        (lambda x, w: 0.5 * x * (1.1 + torch.erf(x / 2**0.5)) * (x + w), "not-gelu"),
        (lambda x, w: 0.5 * x * (1.0 - torch.erf(x / 2**0.5)) * (x + w), "not-gelu"),
        (lambda x, w: 0.5 * x * torch.erfc(-x / 2**0.5) * (x + w), "not-gelu"),
        (lambda x, w: x / (1.0 + torch.exp(-x)) * (x + w), "sigmoid-by-hand"),
        (lambda x, w: x / (1.0 + torch.exp2(-x)) * (x + w), "sigmoid-by-hand"),
        (lambda x, w: F.hardsigmoid(x) * x * (x + w), "sigmoid-by-hand"),
        (lambda x, w: (torch.sigmoid(x) + x) * (x + w), "not-silu"),
        (lambda x, w: 0.5 * (x + w) * (1.0 + torch.erf(x / 2**0.5)) * (x + w), "not-gelu"),
    ],
)
def test_look_alikes(function: Function, code: str) -> None:
    fused = fuse(function, "fuse_mlp")
    assert set(fused.codes) == {code}
    assert not any(op.startswith("graphopt.") for op in fused.ops)


def test_a_router_is_no_candidate() -> None:
    fused = fuse(lambda x, w: torch.sigmoid(x) + w, "fuse_mlp")
    assert fused.codes == []


def test_golden(golden_graph: GoldenGraph) -> None:
    fused = fuse(lambda x, w: ACT2FN["gelu_new"](x * 2) * (x + w), "fuse_mlp", torch.bfloat16)
    golden_graph(fused.graph, "geglu")
