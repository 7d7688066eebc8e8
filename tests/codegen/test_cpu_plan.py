"""Buffers of a plan: no two that live at one time share a byte, for any number of rows."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import graphopt
from graphopt.codegen.cpu.abi import Op, Sym, UnaryKind
from graphopt.codegen.cpu.executable import CpuServing
from graphopt.codegen.cpu.lower import elementwise
from graphopt.codegen.cpu.plan import ARENA, Plan, PlanBuilder
from graphopt.codegen.cpu.plan_steps import External, HostStep, NativeStep, Temporary
from graphopt.codegen.cpu.views import Extent, View, row_major

TOKENS = (1, 2, 3, 7, 64, 1000)


class Planned:
    """A plan of copies between random buffers: what `elementwise` needs of a Lowering."""

    def __init__(self) -> None:
        self.plan = PlanBuilder()

    def buffer(self, extents: Sequence[Extent], external: str = "") -> View:
        size = Extent(4 * 10**9, Sym.SYM_TOKENS)
        number = self.plan.external(external, size) if external else self.plan.temporary(extents, 4)
        return View(number, torch.float32, tuple(extents), row_major(extents))

    def add(self, op: Op, operands: Sequence[View | None], *rest: object) -> None:
        dims, strides, *attributes = (tuple(part) for part in rest)  # type: ignore[arg-type, var-annotated]
        self.plan.steps.append(NativeStep(op, tuple(operands), dims, strides, *attributes))

    def combine(self, out: View, *sources: View) -> None:
        for source in sources:
            kind = (int(UnaryKind.UNARY_NEG),)
            elementwise(self, Op.OP_UNARY, [out, source], kind)  # type: ignore[arg-type]


def random_plan(numbers: random.Random) -> Planned:
    """Values of a fixed size and values that grow, each read up to three times, at any later
    time; some by the host."""
    made = Planned()
    live: list[View] = []
    source = made.buffer([Extent(1, Sym.SYM_TOKENS), Extent(8)], "tokens")
    for _ in range(numbers.randrange(5, 40)):
        width = numbers.choice([1, 8, 16, 100])
        rows = numbers.choice([Extent(1, Sym.SYM_TOKENS), Extent(1, Sym.SYM_LOGIT_ROWS)])
        grows = numbers.random() < 0.6
        out = made.buffer([rows, Extent(width)] if grows else [Extent(width)])
        like = [v for v in live if v.extents == out.extents]
        chosen = numbers.sample(like, min(len(like), numbers.randrange(3)))
        if numbers.random() < 0.2:
            made.plan.steps.append(HostStep(lambda _: None, (out, *chosen), "host", "op", "%1"))
        elif chosen:
            made.combine(out, *chosen)
        else:
            made.combine(out, View(source.buffer, torch.float32, out.extents, out.strides))
        live.append(out)
    return made


def lives(plan: PlanBuilder) -> dict[int, tuple[int, int]]:
    """Buffer -> its first and last step."""
    found: dict[int, tuple[int, int]] = {}
    for time, step in enumerate(plan.steps):
        for view in step.operands:
            if view is not None and isinstance(plan.buffers[view.buffer], Temporary):
                first, _ = found.get(view.buffer, (time, time))
                found[view.buffer] = (first, time)
    return found


def assert_disjoint(builder: PlanBuilder, plan: Plan) -> int:
    """No two buffers alive at once overlap, and all lie in the arena; pairs that were compared."""
    alive, compared = lives(builder), 0
    for tokens in TOKENS:
        ranges = {}
        for number in alive:
            buffer, (base, fixed, growing) = builder.buffers[number], plan.places[number]
            assert isinstance(buffer, Temporary)
            assert base == ARENA
            start = fixed + growing * tokens
            ranges[number] = (start, start + buffer.fixed_bytes + buffer.bytes_per_token * tokens)
            assert ranges[number][1] <= plan.arena_fixed + plan.arena_per_token * tokens
            assert start >= 0
            assert start % 64 == 0
        for a, (a_first, a_last) in alive.items():
            for b, (b_first, b_last) in alive.items():
                if a < b and a_first <= b_last and b_first <= a_last:
                    compared += 1
                    assert ranges[a][1] <= ranges[b][0] or ranges[b][1] <= ranges[a][0], (a, b)
    return compared


def test_buffers_that_live_at_once_are_disjoint() -> None:
    compared = mixed = 0
    for seed in range(100):
        made = random_plan(random.Random(seed))
        plan = made.plan.finish()
        externals = {n for n, b in enumerate(made.plan.buffers) if isinstance(b, External)}
        assert set(plan.places) == lives(made.plan).keys() | externals
        compared += assert_disjoint(made.plan, plan)
        mixed += plan.arena_fixed > 0 < plan.arena_per_token
    assert compared > 10_000
    assert mixed > 50


def test_memory_of_dead_buffers_is_used_again() -> None:
    made = Planned()
    extents = [Extent(1, Sym.SYM_TOKENS), Extent(16)]
    last = made.buffer(extents, "tokens")
    for _ in range(20):
        out = made.buffer(extents)
        made.combine(out, last)
        last = out
    assert made.plan.finish().arena_per_token == 2 * 64


class LateConstant(nn.Module):
    """A value of a constant size, computed first and read last, beside values that grow."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(31, 16), nn.Linear(16, 31)
        self.scale = nn.Parameter(torch.rand(16))

    def forward(self, input_ids: Tensor) -> Tensor:
        scale = torch.exp(torch.sin(self.scale) * 2)
        x = self.embed(input_ids)
        for _ in range(3):
            x = x + torch.tanh(x)
        return self.head(x * scale)


def test_a_constant_that_is_computed_outlives_values_that_grow() -> None:
    torch.seed()
    model = LateConstant().eval()
    program = graphopt.compile(
        model, torch.ones((2, 3), dtype=torch.int64), disable=["fold_constants"]
    )
    executable = program.executable
    assert isinstance(executable, CpuServing)
    assert executable.plan.arena_fixed > 0
    assert executable.plan.arena_per_token > 0
    for rows in (1, 2, 5, 40):
        ids = torch.randint(0, 31, (1, rows))
        torch.testing.assert_close(program(ids), model(ids).detach(), rtol=1e-5, atol=1e-5)
