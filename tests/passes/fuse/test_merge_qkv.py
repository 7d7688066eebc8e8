"""merge_qkv: which linears are merged, which are not and why, values, and that it is opt-in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fuse_block import WIDTH, fuse
from helpers.run_graph import CLEANUP, FUSE, apply, assert_close, assert_idempotent, run
from helpers.tiny_models import tiny_llama
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.ir.weights import PackedWeight
from graphopt.testing import GoldenGraph


class Projections(nn.Module):
    """`combine(*projections of x)`; widths and biases as given."""

    def __init__(
        self,
        widths: tuple[int, ...] = (24, 8, 8),
        biases: tuple[bool, ...] = (False, False, False),
        combine: Callable[..., Tensor] = lambda *parts: torch.cat([p.sin() for p in parts], -1),
    ) -> None:
        super().__init__()
        self.combine = combine
        self.attn = nn.ModuleDict(
            {
                f"{name}_proj": nn.Linear(WIDTH, width, bias)
                for name, width, bias in zip("qkv", widths, biases, strict=False)
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(*(linear(x) for linear in self.attn.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biases", [(False, False, False), (True, True, True), (True, False, True)])
def test_parallel_linears_are_one(biases: tuple[bool, ...], dtype: torch.dtype) -> None:
    """Whisper's keys alone have no bias."""
    fused = fuse(Projections(biases=biases).to(dtype), "merge_qkv", dtype)
    assert fused.codes == []
    assert fused.ops["aten.linear"] == fused.ops["aten.split_with_sizes"] == 1
    name = "merged.attn.q_proj_k_proj_v_proj"
    expected = {f"{name}.weight": (40, WIDTH)} | ({f"{name}.bias": (40,)} if any(biases) else {})
    assert {k: tuple(v.shape) for k, v in fused.graph.weights.items()} == expected


def test_parts_keep_their_layers() -> None:
    graph = fuse(Projections(), "merge_qkv").graph
    layers = [n.meta["layer"] for n in graph.nodes if "getitem" in n.name]
    assert layers == ["attn.q_proj", "attn.k_proj", "attn.v_proj"]


def test_linears_of_different_inputs_are_not_siblings() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    fused = fuse(Chain(), "merge_qkv")
    assert (fused.codes, fused.ops["aten.linear"]) == ([], 2)


class Tied(nn.Module):
    """One weight read by two linears, or by a linear and something else."""

    def __init__(self, elsewhere: bool) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH, False), nn.Linear(WIDTH, WIDTH, False)
        self.elsewhere = elsewhere

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x) * self.k(x)
        return y @ self.k.weight if self.elsewhere else self.k(y)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_tied_weights(elsewhere: bool) -> None:
    fused = fuse(Tied(elsewhere), "merge_qkv")
    assert (fused.codes, fused.ops["aten.linear"]) == (["weight-shared"], 2 + (not elsewhere))


class Unusual(nn.Module):
    """A second linear with a weight that is computed from x, or is a vector."""

    def __init__(self, computed: bool) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH, False)
        self.matrix = nn.Parameter(torch.rand(WIDTH, WIDTH))
        self.vector = nn.Parameter(torch.rand(WIDTH))
        self.computed = computed

    def forward(self, x: Tensor) -> Tensor:
        if self.computed:
            return self.q(x) + F.linear(x, self.matrix * x.mean())
        return self.q(x) * F.linear(x, self.vector)[..., None]


@pytest.mark.parametrize(("computed", "code"), [(True, "weight-computed"), (False, "weight-shape")])
def test_weights_that_are_no_stored_matrices(computed: bool, code: str) -> None:
    fused = fuse(Unusual(computed), "merge_qkv")
    assert (fused.codes, fused.ops["aten.linear"]) == ([code], 2)


def test_weights_of_two_dtypes() -> None:
    """No linear takes another dtype than its input, so the graph is made to say so."""
    graph = capture(Projections().eval(), torch.randn(2, 3, WIDTH), dynamic=False)
    (weight,) = [n for n in graph.nodes if n.target == "attn.k_proj.weight"]
    weight.meta["val"] = weight.meta["val"].to(torch.bfloat16)
    graph.weights["attn.k_proj.weight"] = graph.weights["attn.k_proj.weight"].bfloat16()
    assert [r.code for r in apply(graph, "merge_qkv").rejections("merge_qkv")] == ["weight-dtype"]


def test_packed_weights() -> None:
    graph = capture(Projections().eval(), torch.randn(2, 3, WIDTH), dynamic=False)
    codes = torch.zeros((8, WIDTH), dtype=torch.int8)
    scale = torch.ones((8, 1), dtype=torch.float16)
    graph.packed["attn.k_proj.weight"] = PackedWeight(8, WIDTH, codes, scale, None, 0, "Q8_0")
    (rejection,) = apply(graph, "merge_qkv").rejections("merge_qkv")
    assert rejection.code == "weight-packed"
    assert "dense" in rejection.mend


def test_llama() -> None:
    model = tiny_llama(layers=2)
    graph = capture(model)
    report = apply(graph, *CLEANUP, *FUSE, "merge_qkv")
    assert report.sites("merge_qkv") == 4
    assert graph.op_counts()["aten.linear"] == 2 * 4 + 1
    ids = torch.randint(0, 101, (2, 9))
    with torch.no_grad():
        assert_close(run(graph, ids), model(ids).logits)
    assert_idempotent(graph, [*CLEANUP, *FUSE, "merge_qkv"])


@pytest.mark.parametrize("enable", [[], ["merge_qkv"]])
def test_it_runs_only_when_asked_for(enable: list[str]) -> None:
    model = tiny_llama(layers=1)
    program = graphopt.compile(model, backend="reference", enable=enable)
    assert program.report.sites("merge_qkv") == 2 * len(enable)
    ids = torch.randint(0, 101, (2, 9))
    with torch.no_grad():
        assert_close(program(ids), model(ids).logits)


def test_golden(golden_graph: GoldenGraph) -> None:
    fused = fuse(Projections(biases=(True, False, True)), "merge_qkv")
    golden_graph(fused.graph, "merge_qkv_biases")
