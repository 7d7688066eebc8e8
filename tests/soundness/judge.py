"""Compiles programs side by side and says what became of each: fused, rejected, or neither.

Many programs make one model, so that one export serves them all; program i reads x[i], so that no
two share a value. Each is held to this, whatever its mutation is:

    equal      on fresh inputs of two lengths, as far as the tiers of the passes allow; where more
               differs, the float64 model decides whether it is rounding
    recorded   a candidate of its pass is in the program: a site with its number, an absorbed
               candidate, or a rejection with a code and the line of the program

`judge` counts nothing else: a program that is rewritten and equal is as good as one left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from helpers.run_graph import CLEANUP, FUSE
from mutations import Mutant
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.check.numerics import LEAST_TOLERANCE
from graphopt.check.oracle import relative_error
from graphopt.codegen.reference import ReferenceBackend
from graphopt.ir.graph import Graph
from graphopt.passes.manager import PassManager
from graphopt.record.report import Candidate, Rejection, Report, Site

PROGRAMS_A_MODEL = 24
BATCH, LENGTH = 2, 5
FRESH = (9, 6)
Result = Literal["fused", "rejected", "no record"]


class SideBySide(nn.Module):
    """Many programs as one model: x `[programs, 3, B, S, 32]` and pad `[B, S]` in, a tuple out."""

    def __init__(self, programs: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(programs)

    def forward(self, x: Tensor, pad_BS: Tensor) -> tuple[Tensor, ...]:
        """The results in order."""
        return tuple(part(x[i], pad_BS) for i, part in enumerate(self.parts))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a mutant. error: the largest on any size, relative; code, source: of its
    rejection. is_wrong: other numbers than the model's."""

    mutant: Mutant
    result: Result
    code: str
    source: str
    error: float
    is_wrong: bool


def inputs(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Fresh inputs: rows of `x[:, 0]` down to where an epsilon counts, in every third position; the
    first key of every row of `pad` is seen."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((count, 3, BATCH, length, 32), generator=generator)
    x[:, 0, :, 2::3] *= 0.004
    pad = torch.randint(0, 2, (BATCH, length), generator=generator)
    pad[:, 0] = 1
    return x, pad


def model_of(mutants: Sequence[Mutant], seed: int = 0) -> SideBySide:
    """Their modules side by side, in eval mode, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SideBySide([mutant.description.build() for mutant in mutants]).eval()


def batches(mutants: Iterable[Mutant]) -> list[list[Mutant]]:
    """As many as make one model; those that work in place last, since torch.export traces a model
    with one of them twice."""
    ordered = sorted(mutants, key=lambda mutant: "in-place" in repr(mutant.description))
    starts = range(0, len(ordered), PROGRAMS_A_MODEL)
    return [ordered[start : start + PROGRAMS_A_MODEL] for start in starts]


def compiled(model: SideBySide, passes: Sequence[str] = (*CLEANUP, *FUSE)) -> tuple[Graph, Report]:
    """The graph after `passes`, and their records."""
    example = inputs(len(model.parts), LENGTH, seed=0)
    sizes = {"x": {3: "sequence"}, "pad_BS": {1: "sequence"}}
    graph = capture(model, example, dynamic=sizes)
    report = Report()
    PassManager(passes).run(graph, report)
    return graph, report


def judge(
    mutants: Sequence[Mutant],
    compile_: Callable[[SideBySide], tuple[Graph, Report]] = compiled,
) -> list[Verdict]:
    """Compile all of them as one model and hold each to its word."""
    model = model_of(mutants)
    graph, report = compile_(model)
    errors, wrong = compare(model, ReferenceBackend().lower(graph))
    verdicts = []
    for i, mutant in enumerate(mutants):
        own = [c for c in candidates(report, mutant.pass_name) if c.layer == f"parts.{i}"]
        result, code, source = _record(own)
        verdicts.append(Verdict(mutant, result, code, source, errors[i], wrong[i]))
    return verdicts


def assert_sound(verdicts: Sequence[Verdict]) -> None:
    """No program computes anything else, and none is without a record."""
    wrong = [f"wrong: {v.mutant.name} ({v.error:.1e}, {v.result})" for v in verdicts if v.is_wrong]
    silent = [f"no record: {v.mutant.name}" for v in verdicts if v.result == "no record"]
    assert not wrong + silent, "\n".join(wrong + silent)


def candidates(report: Report, name: str) -> tuple[Candidate, ...]:
    """Of one pass."""
    return next(record.candidates for record in report.passes if record.name == name)


def compare(
    model: SideBySide, program: Callable[..., Sequence[Tensor]]
) -> tuple[list[float], list[bool]]:
    """(largest error, whether it is more than rounding) of each part of `model` in `program`."""
    errors, wrong = [0.0] * len(model.parts), [False] * len(model.parts)
    for seed, length in enumerate(FRESH, start=1):
        x, pad = inputs(len(model.parts), length, seed=seed)
        expected, found = (seeded(f, x, pad) for f in (model, program))
        for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            error, is_more = is_wrong(model.parts[i], x[i], pad, ours, theirs)
            errors[i], wrong[i] = max(errors[i], error), wrong[i] or is_more
    return errors, wrong


def is_wrong(
    part: nn.Module, x: Tensor, pad: Tensor, ours: Tensor, theirs: Tensor
) -> tuple[float, bool]:
    """(relative error of a result, whether it is more than rounding)."""
    error = relative_error([ours], [theirs])
    allowed = LEAST_TOLERANCE * max(1.0, torch.finfo(ours.dtype).eps / 1.2e-7)
    is_near = error <= allowed or _is_rounding(part, x, pad, ours, theirs)
    return error, ours.dtype != theirs.dtype or not is_near


def seeded(f: Callable[..., Sequence[Tensor]], x: Tensor, pad: Tensor) -> Sequence[Tensor]:
    """Called with the same random numbers every time, and on copies: programs work in place."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return f(x.clone(), pad.clone())


def _is_rounding(part: nn.Module, x: Tensor, pad: Tensor, ours: Tensor, theirs: Tensor) -> bool:
    """True when `ours` is as near as `theirs` to what the float64 model computes; a model that
    cannot be run in float64 for its own casts has no such excuse."""
    wide = copy.deepcopy(part).double()
    try:
        with torch.no_grad():
            exact = wide(x.double(), pad)
    except RuntimeError:
        return False
    return relative_error([ours], [exact]) <= 2 * relative_error([theirs], [exact])


def _record(own: Sequence[Candidate]) -> tuple[Result, str, str]:
    """(result, code, source) of the candidates in one program: what counts is a site, else the
    first reason."""
    if any(isinstance(candidate.result, Site) for candidate in own):
        return "fused", "", ""
    for candidate in own:
        rejection = candidate.result
        if isinstance(rejection, Rejection) and rejection.code and rejection.source:
            return "rejected", rejection.code, rejection.source
    return "no record", "", ""
