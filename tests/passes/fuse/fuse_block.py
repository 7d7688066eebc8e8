"""Small blocks through one pass: what it made of them, and what they compute before and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from helpers.run_graph import CLEANUP, apply, assert_close, assert_idempotent, run
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.ir.graph import Graph

WIDTH = 16
Function = Callable[[Tensor, Tensor], Tensor]


class Block(nn.Module):
    """`function(x, weight)` as a module."""

    def __init__(self, function: Function, dtype: torch.dtype) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.rand(WIDTH, dtype=dtype) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


@dataclass(frozen=True)
class Fused:
    """The graph after, and the codes of what was rejected."""

    graph: Graph
    codes: list[str]
    ops: dict[str, int]


def fuse(
    model: Function | nn.Module,
    name: str,
    dtype: torch.dtype = torch.float32,
    *,
    rank: int = 3,
    weight_dtype: torch.dtype | None = None,
) -> Fused:
    """Run cleanup and pass `name`; check values on fresh inputs, and that a second run is idle."""
    if not isinstance(model, nn.Module):
        model = Block(model, weight_dtype or dtype)
    shape = (3, 2, 5, WIDTH)[-rank:]
    dynamic = {"x": {0: "batch"} if rank < 4 else {0: "batch", 2: "sequence"}}
    graph = capture(model.eval(), torch.randn(shape, dtype=dtype), dynamic=dynamic)
    x = torch.randn((shape[0] + 1, *shape[1:]), dtype=dtype)
    before = run(graph, x)
    report = apply(graph, *CLEANUP, name)
    codes = [rejection.code for rejection in report.rejections(name)]
    mends = [rejection.text for rejection in report.rejections(name)]
    assert all(mends)
    after = run(graph, x)
    if report.sites(name):
        assert_close(after, before, 1e-5 if before.dtype == torch.float32 else 2e-2)
    else:
        assert torch.equal(after, before)
    assert_idempotent(graph, [*CLEANUP, name])
    return Fused(graph, codes, dict(graph.op_counts()))
