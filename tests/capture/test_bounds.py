"""Sizes that a model bounds: captured with the bound, which the graph remembers."""

from __future__ import annotations

import pytest
import torch
from run_graph import assert_close, run
from torch import Tensor, nn
from torch.export import Dim

from graphopt.capture import capture
from graphopt.errors import CaptureError
from graphopt.passes.manager import PassManager
from graphopt.report import Report


class Positions(nn.Module):
    """Learned positions for at most 64 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(50, 16), nn.Embedding(64, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embed(input_ids) + self.positions.weight[: input_ids.shape[1]]


class Head(nn.Module):
    """The lecture's attention head: a triangle of 64 x 64, cut to the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.k, self.q, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(64, 64)))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        length = x.shape[1]
        scores = self.q(x) @ self.k(x).transpose(-2, -1) * 16**-0.5
        scores = scores.masked_fill(self.tril[:length, :length] == 0, float("-inf"))
        return scores.softmax(-1) @ self.v(x)


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 50, shape)


def test_the_bound_of_a_table_is_the_graphs_limit() -> None:
    graph = capture(Positions().eval(), ids(2, 9))
    assert graph.limits == {"sequence": 64}
    assert graph.copy().limits == {"sequence": 64}


def test_the_serving_graph_keeps_the_limit() -> None:
    graph = capture(Positions().eval(), ids(2, 9))
    PassManager(["insert_kv_cache"]).run(graph, Report())
    assert graph.dialect == "serving"
    assert graph.limits == {"sequence": 64}


def test_a_model_without_bounds_has_no_limits() -> None:
    assert capture(nn.Sequential(nn.Embedding(50, 16)).eval(), {"input": ids(2, 9)}).limits == {}


def test_a_head_that_cuts_its_triangle_on_both_axes() -> None:
    torch.manual_seed(0)
    model = Head().eval()
    graph = capture(model, ids(2, 9))
    # torch's export asks for "not 64": the stride of the cut differs there.
    assert graph.limits == {"sequence": 63}
    for length in (1, 2, 17, 63):
        other = ids(3, length)
        with torch.no_grad():
            assert_close(run(graph, other), model(other))


def test_what_stays_violated_names_dynamic() -> None:
    class OnlySixteen(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids + torch.arange(16)

    with pytest.raises(CaptureError, match=r"dynamic="):
        capture(OnlySixteen().eval(), ids(2, 16))


def test_bounds_of_an_exported_program() -> None:
    shapes = {"input_ids": {0: Dim("b"), 1: Dim("s", max=40)}}
    program = torch.export.export(Positions().eval(), (ids(2, 9),), dynamic_shapes=shapes)
    assert capture(program).limits == {"sequence": 40}
