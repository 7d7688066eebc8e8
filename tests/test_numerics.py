"""compile(check="numerics"): right passes pass, a wrong one is named with its rewrite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

import pytest
import torch
from tiny_models import tiny_llama
from torch import fx

import graphopt
from graphopt.errors import NumericsError, UnsupportedError
from graphopt.ir.builder import GraphBuilder, replace
from graphopt.ir.graph import Graph
from graphopt.ops import swiglu
from graphopt.passes import registry
from graphopt.passes.base import EXACT, Pass, Reject, Stage, Tier
from graphopt.passes.registry import register


@pytest.fixture(params=[EXACT, Tier("reassociating", 1e-6), Tier("approximate", metric="none")])
def swapping(request: pytest.FixtureRequest) -> Iterator[Tier]:
    """A pass that exchanges gate and up in the second layer, under some tier."""

    class SwapGate(Pass[fx.Node]):
        name: ClassVar[str] = "swap_gate"
        stage: ClassVar[Stage] = "fuse"
        after: ClassVar[tuple[str, ...]] = ("fuse_mlp",)
        tier: ClassVar[Tier] = request.param

        def match(self, graph: Graph) -> Iterable[fx.Node]:
            return graph.calls(swiglu.SPEC.overload)

        def check(self, graph: Graph, node: fx.Node) -> fx.Node | Reject:
            return node

        def rewrite(self, builder: GraphBuilder, bound: fx.Node) -> None:
            args = list(bound.args)
            if ".1." in bound.meta["layer"]:
                args.reverse()
            with builder.at(bound):
                replace(builder.graph, bound, builder.emit(bound.target, args, like=[bound]))

    register(SwapGate)
    yield request.param
    del registry._REGISTRY["swap_gate"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_pass_keeps_to_its_tier(dtype: torch.dtype) -> None:
    program = graphopt.compile(tiny_llama(layers=3).to(dtype), check="numerics")
    changes = {change.pass_name: change for change in program.report.numerics}
    assert set(changes) == {record.name for record in program.report.passes}
    assert changes["canonicalize_views"].max_relative == 0.0
    assert 0.0 <= changes["fuse_attention"].max_relative < 0.05


def test_a_wrong_rewrite_is_named(swapping: Tier) -> None:
    model = tiny_llama(layers=3)
    if swapping.kind == "approximate":
        program = graphopt.compile(model, check="numerics", enable=["swap_gate"])
        (change,) = (c for c in program.report.numerics if c.pass_name == "swap_gate")
        assert change.max_relative > 1e-4
        assert change.max_ulp > 1
        return
    with pytest.raises(NumericsError, match=r"swap_gate#1 in model.layers.1.mlp at modeling_llama"):
        graphopt.compile(model, check="numerics")
    graphopt.compile(model, check="numerics", disable=["swap_gate"])


def test_the_environment_turns_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not graphopt.compile(tiny_llama()).report.numerics
    monkeypatch.setenv("GRAPHOPT_CHECK", "1")
    assert graphopt.compile(tiny_llama()).report.numerics


def test_other_checks_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="'numerics'"):
        graphopt.compile(tiny_llama(), check="speed")  # type: ignore[arg-type]
