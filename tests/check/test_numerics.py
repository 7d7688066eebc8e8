"""compile(check="numerics"): right passes pass, a wrong one is named with its rewrite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from helpers.tiny_models import tiny_llama
from torch import Tensor, fx, nn

import graphopt
from graphopt.check import numerics
from graphopt.check.oracle import relative_error, same_bits
from graphopt.errors import NumericsError, RequestError, UnsupportedError
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


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([math.inf, 1.0], [-math.inf, 1.0]),
        ([math.nan, 1.0], [math.inf, 1.0]),
        ([math.nan, 1.0], [2.0, 1.0]),
    ],
)
def test_nan_and_infinities_are_compared(found: list[float], expected: list[float]) -> None:
    ours, theirs = torch.tensor(found), torch.tensor(expected)
    assert math.isinf(relative_error([ours], [theirs]))
    assert not same_bits([ours], [theirs])
    assert relative_error([theirs], [theirs]) == 0.0
    assert same_bits([theirs], [theirs])


def test_exact_means_the_sign_of_zero_too() -> None:
    assert not same_bits([torch.tensor([-0.0])], [torch.tensor([0.0])])
    assert not same_bits([], [torch.zeros(1)])
    assert math.isinf(relative_error([], [torch.zeros(1)]))


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.rand_like(x).view(-1) + x.view(-1) * 1.0


def test_no_pass_is_blamed_for_random_ops() -> None:
    x = torch.randn(3, 4)
    program = graphopt.compile(Noise().eval(), x, check="numerics", backend="reference")
    assert all(change.max_relative == 0.0 for change in program.report.numerics)
    assert graphopt.bisect(Noise().eval(), x) is None


@pytest.mark.parametrize("inputs", [[], 5, [torch.ones(1, 2), torch.ones(1, 2)], [torch.ones(2)]])
def test_inputs_that_do_not_fit_are_refused(inputs: Any) -> None:
    with pytest.raises(RequestError):
        graphopt.compile(tiny_llama(1), check="numerics", check_inputs=inputs)
    with pytest.raises(RequestError):
        graphopt.bisect(tiny_llama(1), inputs=inputs)


class Untouched(Pass[fx.Node]):
    """A pass of some tier; only its tier is read."""

    name: ClassVar[str] = "untouched"
    stage: ClassVar[Stage] = "fuse"

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        return []

    def check(self, graph: Graph, node: fx.Node) -> fx.Node | Reject:
        return node

    def rewrite(self, builder: GraphBuilder, bound: fx.Node) -> None:
        """Never called."""


def with_tier(tier: Tier) -> Pass[fx.Node]:
    made: Pass[fx.Node] = type("Named", (Untouched,), {"tier": tier})()
    return made


RELAXED = Tier("reassociating", 1e-4)


@pytest.mark.parametrize(
    ("tier", "dtypes", "allowed"),
    [
        (EXACT, [torch.float32], 0.0),
        (EXACT, [torch.bfloat16], 0.0),
        (Tier("approximate", metric="none"), [torch.float32], math.inf),
        # float32 and finer: what the tier says, and what the depth of a model makes of rounding.
        (RELAXED, [torch.float32], 1e-4),
        (RELAXED, [torch.float64], 1e-4),
        (Tier("reassociating", 1e-9), [torch.float32], numerics.LEAST_TOLERANCE),
        # Coarser types round more, up to a limit; the coarsest output counts.
        (RELAXED, [torch.float16], 1e-4 * 2**13),
        (RELAXED, [torch.float16, torch.float32], 1e-4 * 2**13),
        (RELAXED, [torch.bfloat16], 1e-4 * 5e3),
        (RELAXED, [torch.int64], 1e-4),
        (RELAXED, [], 1e-4),
    ],
)
def test_what_a_tier_allows(tier: Tier, dtypes: list[torch.dtype], allowed: float) -> None:
    outputs = [torch.ones(2).to(dtype) for dtype in dtypes]
    expected = min(allowed, tier.tolerance * 5e3) if tier is RELAXED else allowed
    assert numerics.allowance(with_tier(tier), outputs) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tier", "moved_by", "is_kept"),
    [
        (EXACT, 0.0, True),
        (EXACT, 1e-7, False),
        (RELAXED, 5e-5, True),
        (RELAXED, 2e-4, False),
        (Tier("approximate", metric="none"), 3.0, True),
    ],
)
def test_a_tier_is_kept_or_not(tier: Tier, moved_by: float, is_kept: bool) -> None:
    before = [torch.tensor([1.0, 0.5])]
    after = [before[0] + torch.tensor([moved_by, 0.0])]
    change = numerics.measure("p", after, before)
    pass_ = with_tier(tier)
    assert numerics.keeps_tier(pass_, change, after, before) == is_kept
    text = numerics.excess(pass_, change, numerics.allowance(pass_, before))
    assert f"{change.max_relative:.2e} relative ({change.max_absolute:.2e} absolute" in text
    assert f"its tier {tier.kind!r} allows" in text


def test_a_change_is_measured_absolute_relative_and_in_ulp() -> None:
    before = [torch.tensor([-4.0, 1.0]), torch.tensor([8.0]), torch.arange(3), torch.empty(0)]
    after = [torch.tensor([-4.0, 1.5]), torch.tensor([8.25]), torch.arange(3), torch.empty(0)]
    change = numerics.measure("p", after, before)
    assert (change.pass_name, change.max_absolute, change.max_relative) == ("p", 0.5, 0.125)
    assert change.max_ulp == 0.125 / torch.finfo(torch.float32).eps
    # nan and infinities in the same places count nothing, those in one alone everything.
    odd = [torch.tensor([math.nan, math.inf, 2.0])]
    moved = [torch.tensor([math.nan, math.inf, 3.0])]
    change = numerics.measure("p", moved, odd)
    assert (change.max_absolute, change.max_relative) == (1.0, 0.5)
    assert numerics.measure("p", odd, [torch.tensor([0.0, math.inf, 2.0])]).max_ulp == math.inf
    zeros = [torch.zeros(2)]
    assert numerics.measure("p", zeros, zeros).max_ulp == 0.0


def test_outputs_that_say_nothing_are_noted_once() -> None:
    class Infinite(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.contiguous() * 1.0 / 0.0).contiguous()

    x = torch.rand(2, 3) + 1
    program = graphopt.compile(Infinite().eval(), x, check="numerics", backend="reference")
    notes = [note for note in program.report.notes if "nan or infinite" in note]
    assert len(notes) == 1
    program = graphopt.compile(Noise().eval(), x, check="numerics", backend="reference")
    assert not [note for note in program.report.notes if "nan or infinite" in note]


def test_integers_and_shapes_are_compared() -> None:
    ones, twos = [torch.ones(2).long()], [torch.full((2,), 2)]
    assert relative_error(ones, ones) == 0.0
    assert math.isinf(relative_error(ones, twos))
    assert math.isinf(relative_error([torch.ones(2)], [torch.ones(2, 1)]))
    assert not same_bits(ones, twos)
    assert not same_bits([torch.ones(2)], [torch.ones(2).double()])
    assert relative_error([torch.tensor([1.0, 3.0])], [torch.tensor([2.0, 4.0])]) == 0.25
    assert relative_error([torch.empty(0)], [torch.empty(0)]) == 0.0
