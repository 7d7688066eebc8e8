"""Every mutant of a norm, a gated activation and a rotary embedding: equal to the model, and
recorded with a code and a line. What judges them is tried on wrong rewrites."""

from __future__ import annotations

from dataclasses import replace

import pytest
from every_mutant import KINDS
from helpers.run_graph import FUSE
from judge import SideBySide, assert_sound, batches, compiled, judge
from mutations import Mutant

from graphopt.ir.graph import Graph
from graphopt.ops import attention, geglu, rms_norm, rope, swiglu
from graphopt.record.report import Report

BATCHES = [
    (name, batch)
    for name in ("norm", "gated activation", "rotary embedding")
    for batch in batches(KINDS[name])
]


@pytest.mark.parametrize("at", range(len(BATCHES)))
def test_mutants(at: int) -> None:
    assert_sound(judge(BATCHES[at][1]))


def test_there_are_enough_and_no_two_are_the_same() -> None:
    every = [mutant for kind in KINDS.values() for mutant in kind]
    assert len(every) >= 600
    assert len({mutant.description for mutant in every}) == len(every)
    assert len({(mutant.pass_name, mutant.name) for mutant in every}) == len(every)
    assert {mutant.pass_name for mutant in every} == set(FUSE)


SPOILED = [
    (attention.SPEC.overload, "scale", 0.3),
    (rms_norm.SPEC.overload, "eps", 2e-5),
    (geglu.SPEC.overload, "approximate", "tanh"),
    (rope.SPEC.overload, "interleaved", True),
]


def first_of_each() -> list[Mutant]:
    """The first base of each kind, and gelu."""
    return [*(kind[0] for kind in KINDS.values()), KINDS["gated activation"][2]]


@pytest.mark.parametrize("at", range(len(SPOILED)))
def test_a_wrong_rewrite_is_seen(at: int) -> None:
    op, name, value = SPOILED[at]

    def spoiled(model: SideBySide) -> tuple[Graph, Report]:
        graph, report = compiled(model)
        (call,) = graph.calls(op)
        call.kwargs = {**call.kwargs, name: value}
        return graph, report

    verdicts = judge(first_of_each(), spoiled)
    assert sum(verdict.is_wrong for verdict in verdicts) == 1
    with pytest.raises(AssertionError, match="wrong: "):
        assert_sound(verdicts)


def test_a_swapped_operand_is_seen() -> None:
    def swapped(model: SideBySide) -> tuple[Graph, Report]:
        graph, report = compiled(model)
        (call,) = graph.calls(swiglu.SPEC.overload)
        call.args = call.args[::-1]
        return graph, report

    assert [v.is_wrong for v in judge(first_of_each(), swapped)].count(True) == 1


def test_a_missing_record_is_seen() -> None:
    def silent(model: SideBySide) -> tuple[Graph, Report]:
        graph, report = compiled(model)
        report.passes = [
            replace(record, candidates=()) if record.name == "fuse_norm" else record
            for record in report.passes
        ]
        return graph, report

    verdicts = judge(first_of_each(), silent)
    assert [v.result for v in verdicts] == ["fused", "no record", "fused", "fused", "fused"]
    with pytest.raises(AssertionError, match=r"no record: .*rms"):
        assert_sound(verdicts)
