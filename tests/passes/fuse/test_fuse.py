"""fuse_norm, fuse_rope, fuse_mlp: spellings, look-alikes with their codes, values, idempotence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from run_graph import CLEANUP, FUSE, apply, assert_close, assert_idempotent, run
from tiny_models import tiny_llama
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.ir.graph import Graph
from graphopt.models.llama_like import LlamaLike, LlamaLikeConfig

WIDTH = 16


class Block(nn.Module):
    """`function(x, weight)` as a module."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.rand(WIDTH, dtype=dtype) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def fuse(
    function: Callable[[Tensor, Tensor], Tensor], name: str, dtype: torch.dtype, rank: int = 3
) -> tuple[Graph, Tensor, Tensor, list[str]]:
    """(graph after, output before, output after, reject codes)."""
    x = torch.randn((3, 2, 5, WIDTH)[-rank:], dtype=dtype)
    graph = capture(Block(function, dtype).eval(), x, dynamic={"x": {0: "batch"}})
    before = run(graph, x)
    report = apply(graph, *CLEANUP, name)
    codes = [rejection.code for rejection in report.rejections(name)]
    assert_idempotent(graph, [*CLEANUP, name])
    return graph, before, run(graph, x), codes


def llama_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * wide.to(x.dtype)


def gemma_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (wide * (1.0 + weight.float())).type_as(x)


def bare_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) + weight


def swapped_norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * x * weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [llama_norm, gemma_norm])
def test_norms_in_both_cast_orders(
    norm: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    graph, before, after, codes = fuse(norm, "fuse_norm", dtype)
    assert codes == []
    assert graph.op_counts() == {"graphopt.rms_norm": 1}
    assert_close(after, before, 1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("norm", [bare_norm, swapped_norm])
def test_norms_in_other_spellings(norm: Callable[[Tensor, Tensor], Tensor]) -> None:
    graph, before, after, _ = fuse(norm, "fuse_norm", torch.float32)
    assert graph.op_counts()["graphopt.rms_norm"] == 1
    assert_close(after, before, 1e-6)


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * w, "mean-axis"),
        (lambda x, w: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6) * w, "no-square"),
        (lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * w, "no-epsilon"),
        (
            lambda x, w: w * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
            "rsqrt-used-elsewhere",
        ),
    ],
)
def test_norm_look_alikes(function: Callable[[Tensor, Tensor], Tensor], code: str) -> None:
    graph, before, after, codes = fuse(function, "fuse_norm", torch.float32)
    assert codes == [code]
    assert "graphopt.rms_norm" not in graph.op_counts()
    assert torch.equal(after, before)


def rotate(x: Tensor, commuted: bool = False) -> Tensor:
    positions = torch.arange(x.shape[2], dtype=x.dtype)
    angles = torch.outer(positions, 0.01 ** torch.arange(0, 1, 2 / WIDTH, dtype=x.dtype))
    angles = torch.cat([angles, angles], -1)[None]
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    first, second = x[..., : WIDTH // 2], x[..., WIDTH // 2 :]
    turned = torch.cat([-second, first], -1)
    return sin * turned + cos * x if commuted else x * cos + turned * sin


@pytest.mark.parametrize("commuted", [False, True])
def test_rope(commuted: bool) -> None:
    graph, before, after, codes = fuse(
        lambda x, w: rotate(x, commuted), "fuse_rope", torch.float32, rank=4
    )
    assert codes == []
    assert graph.op_counts()["graphopt.rope"] == 1
    assert graph.op_counts()["aten.neg"] == 0
    assert_close(after, before, 1e-6)


def wrong_halves(x: Tensor) -> Tensor:
    turned = torch.cat([-x[..., : WIDTH // 2], x[..., WIDTH // 2 :]], -1)
    table = torch.ones(1, x.shape[2], WIDTH).unsqueeze(1)
    return x * table + turned * table


def test_rope_with_the_halves_swapped_is_left_alone() -> None:
    _, before, after, codes = fuse(lambda x, w: wrong_halves(x), "fuse_rope", torch.float32, rank=4)
    assert codes == ["not-two-halves"]
    assert torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("activation", "op"),
    [
        (F.silu, "graphopt.swiglu"),
        (F.gelu, "graphopt.geglu"),
        (lambda x: F.gelu(x, approximate="tanh"), "graphopt.geglu"),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_gated_activations(
    activation: Callable[[Tensor], Tensor], op: str, swapped: bool, dtype: torch.dtype
) -> None:
    def gated(x: Tensor, w: Tensor) -> Tensor:
        gate, up = x * 2, x + w
        return up * activation(gate) if swapped else activation(gate) * up

    graph, before, after, codes = fuse(gated, "fuse_mlp", dtype)
    assert codes == []
    assert graph.op_counts()[op] == 1
    assert torch.equal(after, before)


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (lambda x, w: F.gelu(x) + w, "not-gated"),
        (lambda x, w: F.silu(x) * 2.0, "not-gated"),
        (lambda x, w: F.silu(x) * w, "gate-shape"),
    ],
)
def test_ungated_activations(function: Callable[[Tensor, Tensor], Tensor], code: str) -> None:
    _, before, after, codes = fuse(function, "fuse_mlp", torch.float32)
    assert codes == [code]
    assert torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_hugging_face_llama(dtype: torch.dtype, padded: bool) -> None:
    model = tiny_llama(layers=3).to(dtype)
    ids = torch.randint(0, 101, (3, 11))
    inputs = {"input_ids": ids}
    if padded:
        mask = torch.ones_like(ids)
        mask[1, 7:] = 0
        inputs["attention_mask"] = mask
    graph = capture(model, inputs)
    report = apply(graph, *CLEANUP, *FUSE)
    sites = {name: report.sites(name) for name in FUSE}
    assert sites == {"fuse_attention": 3, "fuse_norm": 7, "fuse_rope": 6, "fuse_mlp": 3}
    with torch.no_grad():
        expected = model(**inputs).logits
    actual = run(graph, *inputs.values())
    visible = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert_close(actual[visible], expected[visible], tolerance)
    assert_idempotent(graph, [*CLEANUP, *FUSE])


def test_our_own_llama() -> None:
    torch.manual_seed(0)
    model = LlamaLike(LlamaLikeConfig()).eval()
    ids = torch.randint(0, 256, (2, 13))
    graph = capture(model, ids)
    report = apply(graph, *CLEANUP, *FUSE)
    sites = {name: report.sites(name) for name in FUSE}
    assert sites == {"fuse_attention": 2, "fuse_norm": 5, "fuse_rope": 4, "fuse_mlp": 2}
    assert_close(run(graph, ids), model(ids))


def test_every_new_node_says_where_it_comes_from() -> None:
    graph = capture(tiny_llama())
    apply(graph, *CLEANUP, *FUSE)
    for node in graph.nodes:
        if node.op == "call_function" and str(node.target).startswith("graphopt."):
            assert node.meta["source"].startswith("modeling_llama.py:")
            assert node.meta["layer"]
            assert any("fuse_" in name for name in node.meta["history"])
            assert len(node.meta["history"]) > 1
