"""Random graphs over every rule of the mask tables: what is read is what torch computes."""

from __future__ import annotations

import random

import pytest
import torch
from random_masks import RandomMasks
from torch import fx

from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks.arithmetic import ARITHMETIC
from graphopt.passes.analysis.masks.numbers import NUMBERS
from graphopt.passes.analysis.masks.views import MOVING

aten = torch.ops.aten


def _is_drawn(op: object) -> bool:
    """Overloads that take and give tensors; what baddbmm multiplies has a name of its own."""
    schema = op._schema  # type: ignore[attr-defined]
    returns = [str(r.type) for r in schema.returns] == ["Tensor"]
    return returns and not any(a.is_out for a in schema.arguments) and op not in _SPECIAL


_SPECIAL = (aten.baddbmm.default,)
OPS = [op for op in {**ARITHMETIC, **MOVING, **NUMBERS} if _is_drawn(op)]


def _is_opaque(graph: RandomMasks, node: fx.Node) -> bool:
    return any(read.tensor == node.name for read in ia.reads(graph.read(node)))


def _check(graph: RandomMasks, node: fx.Node) -> None:
    element, wanted = graph.read(node), graph.values[node]
    found = graph.computed(element, wanted.shape)
    if wanted.dtype == torch.bool:
        assert ia.kind_of(element) == "bool"
        assert torch.equal(found, wanted), (node.format_node(), element)
        return
    assert (ia.kind_of(element) == "float") == wanted.is_floating_point(), element
    found, wanted = found.to(wanted.dtype).double(), wanted.double()
    is_same = torch.allclose(found, wanted, 1e-5, 1e-6, equal_nan=True)
    assert is_same, (node.format_node(), element)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_random_calls_of_each_op(op: object) -> None:
    read = 0
    for seed in range(3):
        graph = RandomMasks(seed)
        for _ in range(8):
            node = graph.draw(op)
            if node is None:
                continue
            _check(graph, node)
            read += not _is_opaque(graph, node)
    assert read, f"{op} was never read: its rule reads nothing, or no call could be drawn"


@pytest.mark.parametrize("seed", range(12))
def test_random_graphs_of_all_ops(seed: int) -> None:
    graph, choose = RandomMasks(seed), random.Random(seed)
    for _ in range(60):
        node = graph.draw(choose.choice(OPS))
        if node is not None:
            _check(graph, node)
