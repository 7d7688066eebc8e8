"""Every pass on a small graph, before and after, in `tests/golden/<pass>.gir`.

The replays read the graph before from the file, so they run wherever graphopt does, whatever torch
captured it. The rewrites capture it again from the models below; what no model brings about (dead
calls, asserts) is written by hand and only replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.run_graph import CLEANUP, apply
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.ir.graph import Graph
from graphopt.ir.weights import PackedWeight
from graphopt.passes.registry import all_passes
from graphopt.testing import GoldenGraph

GOLDEN = Path(__file__).parent.parent / "golden"
BUILT_IN = sorted(n for n, cls in all_passes().items() if cls.__module__.startswith("graphopt."))
WIDTH, HEADS, GROUP = 16, 2, 32
Forward = Callable[[nn.Module, Tensor], Tensor]


class Block(nn.Module):
    """`forward` of this module and x, with the layers and weights that the functions below use."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.function = function
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        for name in ("q", "k", "v", "gate", "up", "down"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def noops(m: Block, x: Tensor) -> Tensor:
    y = F.dropout(x.contiguous() * 1.0, 0.1, training=False)
    return y[:, :, 0:WIDTH].to(torch.float32) * m.weight


def views(m: Block, x: Tensor) -> Tensor:
    y = x.unflatten(-1, (HEADS, -1)).permute(0, 2, 1, 3)
    return (y.mT @ y).transpose(-3, -2).flatten(2)


def repeated(m: Block, x: Tensor) -> Tensor:
    return m.q(x.cos()) + m.k(x.cos())


def constants(m: Block, x: Tensor) -> Tensor:
    return x * (1.0 + m.weight)


def attention(m: Block, x: Tensor) -> Tensor:
    q, k, v = (heads(linear(x)) for linear in (m.q, m.k, m.v))
    scores = q @ k.transpose(-1, -2) * 0.5
    length = x.shape[1]
    visible = torch.arange(length)[None, :] <= torch.arange(length)[:, None]
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def norm(m: Block, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.weight


def rope(m: Block, x: Tensor) -> Tensor:
    y = heads(x)
    angles = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
    table = torch.cat([angles, angles], -1)[None, None]
    first, second = y.chunk(2, -1)
    return y * table.cos() + torch.cat([-second, first], -1) * table.sin()


def mlp(m: Block, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x)) * m.up(x))


def projections(m: Block, x: Tensor) -> Tensor:
    return torch.cat([m.q(x).cos(), m.k(x).sin(), m.v(x)], -1)


BLOCKS: dict[str, tuple[Forward, tuple[str, ...]]] = {
    "remove_noops": (noops, ()),
    "canonicalize_views": (views, ()),
    "common_subexpressions": (repeated, ()),
    "fold_constants": (constants, ()),
    "fuse_attention": (attention, CLEANUP),
    "fuse_norm": (norm, CLEANUP),
    "fuse_rope": (rope, CLEANUP),
    "fuse_mlp": (mlp, CLEANUP),
    "merge_qkv": (projections, CLEANUP),
}


def of_block(name: str) -> Graph:
    function, before = BLOCKS[name]
    graph = capture(
        Block(function).eval(),
        torch.randn(2, 5, WIDTH),
        dynamic={"x": {0: "batch", 1: "sequence"}},
    )
    apply(graph, *before)
    return graph


def packed_weight() -> PackedWeight:
    """4-bit codes of a [64, 32] matrix in one group a row, with a zero point."""
    scale, zero = (torch.rand((64, 1)).half() for _ in range(2))
    codes = torch.randint(0, 256, (64, GROUP // 2), dtype=torch.uint8)
    return PackedWeight(4, GROUP, codes, scale, zero, 0, "Q4_1")


class Tied(nn.Module):
    """A language model of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, GROUP))

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(F.embedding(ids, self.table), self.table)


def low_bit() -> Graph:
    graph = capture(Tied().eval(), torch.zeros((2, 5), dtype=torch.int64))
    graph.packed["table"] = packed_weight()
    return graph


def int8_products() -> Graph:
    graph = low_bit()
    apply(graph, "fold_low_bit_weights")
    return graph


class Decoder(nn.Module):
    """One attention between an embedding and a head, with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.places = nn.Embedding(64, WIDTH)
        self.head = nn.Linear(WIDTH, 50, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places(torch.arange(ids.shape[1]))
        y = heads(x)
        attended = F.scaled_dot_product_attention(y, y, y, is_causal=True)
        return self.head(x + attended.transpose(1, 2).flatten(2))


def forward_graph() -> Graph:
    graph = capture(Decoder().eval(), torch.zeros((2, 5), dtype=torch.int64))
    apply(graph, *CLEANUP, "fuse_attention")
    return graph


GRAPHS: dict[str, Callable[[], Graph]] = {
    **{name: partial(of_block, name) for name in BLOCKS},
    "fold_low_bit_weights": low_bit,
    "quantize_activations": int8_products,
    "insert_kv_cache": forward_graph,
}
PACKED = {"fold_low_bit_weights": {"table": packed_weight()}}


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_pass_has_a_golden_graph(name: str) -> None:
    assert (GOLDEN / f"{name}.gir").exists(), f"add a graph to GRAPHS, or write one into {name}.gir"


@pytest.mark.parametrize("name", GRAPHS)
def test_rewrite(golden_graph: GoldenGraph, name: str) -> None:
    golden_graph.rewrite(GRAPHS[name](), name, name)


@pytest.mark.parametrize("name", BUILT_IN)
def test_replay(golden_graph: GoldenGraph, name: str) -> None:
    golden_graph.replay(name, name, packed=PACKED.get(name))
