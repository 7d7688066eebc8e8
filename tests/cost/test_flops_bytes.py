"""Costs against numbers worked out by hand, and against torch's own counter on an eager model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.run_graph import CLEANUP, FUSE, apply
from helpers.tiny_models import tiny_llama
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from graphopt.capture import capture
from graphopt.cost.flops_bytes import NodeCost, axis_sizes, call_cost, graph_costs
from graphopt.cost.machines import MACHINES, Machine
from graphopt.ir.graph import op_name
from graphopt.ops import attention, embedding_wq, linear_wq, rms_norm

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cost(op: Any, *args: Any, **kwargs: Any) -> NodeCost:
    return call_cost(op, args, kwargs, op(*args, **kwargs))


def test_linear() -> None:
    found = cost(aten.linear.default, meta(2, 5, 16), meta(24, 16), meta(24))
    # 10 rows of 24 outputs, 16 multiply-adds each; input, weight, bias and output once.
    assert found == NodeCost(2 * 10 * 24 * 16, 4 * (10 * 16 + 24 * 16 + 24 + 10 * 24), "f32")


def test_matrix_products_in_every_spelling() -> None:
    a, b = meta(3, 4, dtype=torch.bfloat16), meta(4, 5, dtype=torch.bfloat16)
    expected = NodeCost(2 * 3 * 4 * 5, 2 * (12 + 20 + 15), "bf16")
    assert cost(aten.mm.default, a, b) == expected
    assert cost(aten.matmul.default, a, b) == expected
    assert cost(aten.addmm.default, meta(5), meta(3, 4), meta(4, 5)).flops == 120
    assert cost(aten.bmm.default, meta(7, 3, 4), meta(7, 4, 5)).flops == 7 * 120


def test_convolution() -> None:
    # 6 output channels at 8 places, each over 3 taps of 4 channels.
    found = cost(aten.conv1d.default, meta(1, 4, 10), meta(6, 4, 3))
    assert found.flops == 2 * 6 * 8 * 3 * 4
    grouped = cost(aten.conv1d.default, meta(1, 4, 10), meta(4, 1, 3), None, [1], [0], [1], 4)
    assert grouped.flops == 2 * 4 * 8 * 3


def test_attention() -> None:
    q, k = meta(1, 8, 6, 16), meta(1, 2, 6, 16)
    full = cost(attention.SPEC.overload, q, k, k, scale=0.25)
    # Scores and weighted sum: 8 heads, 6 x 6 pairs, 16 + 16 multiply-adds.
    assert full.flops == 2 * 8 * 36 * 32
    assert full.bytes == 4 * (2 * 8 * 6 * 16 + 2 * 2 * 6 * 16)
    assert full.unit == "f32"
    assert cost(attention.SPEC.overload, q, k, k, scale=0.25, causal=True).flops == full.flops / 2
    dense = cost(aten.scaled_dot_product_attention.default, q, q, q)
    assert dense.flops == full.flops


def test_norm_and_softmax() -> None:
    x = meta(2, 3, 8)
    norm = cost(rms_norm.SPEC.overload, x, meta(8), eps=1e-6, weight_offset=0.0, cast_first=True)
    assert norm.bytes == 4 * (48 + 8 + 48)
    assert norm.unit == "vector"
    assert cost(aten.softmax.int, x, -1) == NodeCost(5 * 48, 4 * 96)


def test_what_moves_data_computes_nothing() -> None:
    x = meta(2, 3, 8)
    assert cost(aten.transpose.int, x, 0, 1) == NodeCost(0, 0)
    assert cost(aten.reshape.default, x, [6, 8]) == NodeCost(0, 0)
    assert cost(aten.slice.Tensor, x, 0, 0, 1) == NodeCost(0, 0)
    assert cost(aten.to.dtype, x, torch.float32) == NodeCost(0, 0)
    assert cost(aten.to.dtype, x, torch.bfloat16) == NodeCost(0, 48 * 6)
    assert cost(aten.cat.default, [x, x], 0) == NodeCost(0, 4 * 192)
    assert cost(aten.sym_size.int, x, 0) == NodeCost(0, 0)


def test_a_lookup_reads_its_rows_only() -> None:
    ids = meta(2, 5, dtype=torch.int64)
    found = cost(aten.embedding.default, meta(1000, 16), ids)
    assert found == NodeCost(0, 8 * 10 + 4 * 160 + 4 * 160)


def test_elementwise_and_reductions_count_elements() -> None:
    assert cost(aten.add.Tensor, meta(4, 8), meta(8)) == NodeCost(32, 4 * (32 + 8 + 32))
    assert cost(aten.mean.dim, meta(4, 8), [-1]) == NodeCost(32, 4 * (32 + 4))


def test_int8_products_are_a_unit_of_their_own() -> None:
    codes, scale = meta(24, 16, dtype=torch.uint8), meta(24, 1)
    kwargs = {"bits": 4, "group": 32, "offset": 8}
    for activation, unit in (("int8", "i8"), ("float", "f32")):
        found = cost(
            linear_wq.SPEC.overload, meta(5, 32), codes, scale, activation=activation, **kwargs
        )
        assert (found.flops, found.unit) == (2 * 5 * 32 * 24, unit)


class Block(nn.Module):
    """Every kind of matrix product in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BSD).chunk(3, -1)
        mixed = torch.softmax(q @ k.transpose(1, 2), -1) @ v
        return torch.bmm(self.conv(mixed.transpose(1, 2)), mixed)


def test_the_sum_is_that_of_torchs_counter() -> None:
    model = Block().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(3, 5, 16))
    graph = capture(model, torch.randn(2, 5, 16))
    costs = graph_costs(graph, batch=3)
    products = sum(cost.flops for cost in costs.values() if cost.unit != "vector")
    assert products == counter.get_total_flops() > 0


def test_a_serving_graph_costs_its_rows() -> None:
    graph = capture(tiny_llama())
    apply(graph, *CLEANUP, *FUSE, "insert_kv_cache")
    found = reversed(graph_costs(graph, 2, 40).items())
    # Of the first layer: the last one computes only the rows whose logits are wanted.
    costs = {op_name(node): cost for node, cost in found}
    # 80 rows; each request has 3 blocks of 16 tokens, 4 heads of 16.
    assert costs["graphopt.swiglu"].bytes == 4 * 3 * 80 * 96
    assert costs["graphopt.paged_attention"].flops == 2 * 4 * 80 * 48 * 32
    assert axis_sizes(2, 40)["blocks"] == 6


def test_fusion_removes_traffic_and_no_products() -> None:
    graph = capture(tiny_llama())
    fused = graph.copy()
    apply(fused, *CLEANUP, *FUSE)
    before, after = ([*graph_costs(g).values()] for g in (graph, fused))
    assert sum(c.bytes for c in after) < sum(c.bytes for c in before)
    products = [sum(c.flops for c in costs if c.unit != "vector") for costs in (before, after)]
    assert products[0] == products[1]


def test_bound_of_a_machine() -> None:
    machine = Machine("m", {"f32": 100.0, "bf16": 400.0}, 10.0, 50.0)
    assert machine.bound(1000, 50, "f32") == (10.0, "compute")
    assert machine.bound(1000, 50, "bf16") == (2.5, "compute")
    assert machine.bound(1000, 50) == (100.0, "compute")
    assert machine.bound(10, 500, "f32") == (10.0, "memory")
    # A dtype without a rate of its own runs as f32.
    assert machine.peak("f16") == machine.peak("f32")


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_machines_are_whole(machine: Machine) -> None:
    assert machine.matrix["f32"] > 0
    assert machine.vector > machine.bytes_per_second / 1e3


@pytest.mark.parametrize(
    ("bits", "codes", "dtype"), [(4, 32, torch.float32), (8, 64, torch.bfloat16)]
)
def test_a_low_bit_embedding_by_hand(bits: int, codes: int, dtype: torch.dtype) -> None:
    """Three ids of width 64, groups of 32, no zero points."""
    spent = embedding_wq.SPEC.cost(
        torch.zeros(1, 3, dtype=torch.int64),
        torch.zeros(10, codes, dtype=torch.uint8),
        torch.zeros(10, 2, dtype=torch.float16),
        None,
        bits=bits,
        group=32,
        offset=0,
        dtype=dtype,
    )
    assert spent.flops == 3 * 64 * 2
    assert spent.bytes == 3 * (codes + 2 * 2 + 64 * dtype.itemsize)
