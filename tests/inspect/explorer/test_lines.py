"""Lines of a graph text, taken apart."""

from __future__ import annotations

import pytest

from graphopt.inspect.explorer.lines import GraphLine, read_lines
from graphopt.program.program import Program


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "%24 : f32[b, 8] = graphopt.rms_norm(%2, @a.w, eps=1e-5)  # a.0 | f.py:3 | %2, r#0",
            GraphLine(
                "call", "%24", "f32[b, 8]", "graphopt.rms_norm", "%2, @a.w, eps=1e-5",
                ("%2", "@a.w"), "a.0", "f.py:3", ("%2", "r#0"),
            ),
        ),
        (
            "%1 : f32[2] = aten.add.Tensor(%0, %0)  #  | ",
            GraphLine("call", "%1", "f32[2]", "aten.add.Tensor", "%0, %0",
                      ("%0",), "", "", ("%1",)),
        ),
        (
            "%6 : none = graphopt.kv_write(%k_cache_0, %3)  # a | f.py:1 | %3",
            GraphLine("call", "%6", "none", "graphopt.kv_write", "%k_cache_0, %3",
                      ("%k_cache_0", "%3"), "a", "f.py:1", ("%3",)),
        ),
        (
            '%5 : f32[2] = graphopt.attention(%4, predicate="%9 (b) # @x")  # a | f.py:2',
            GraphLine("call", "%5", "f32[2]", "graphopt.attention", '%4, predicate="%9 (b) # @x"',
                      ("%4",), "a", "f.py:2", ("%5",)),
        ),
        ("input %ids : i64[b, s] user", GraphLine("input", "%ids", "i64[b, s]", args="user")),
        ("weight @a.{0-3}.w : f32[8]", GraphLine("weight", "@a.{0-3}.w", "f32[8]")),
        ("return %5, %ids", GraphLine("return", args="%5, %ids", references=("%5", "%ids"))),
        ("gir 1", GraphLine("head", args="gir 1")),
    ],
)  # fmt: skip
def test_a_line(text: str, line: GraphLine) -> None:
    assert read_lines(text) == [line]


def test_every_call_of_a_program_is_read(program: Program) -> None:
    for step in program.trace.steps:
        lines = read_lines(step.text)
        calls = [line for line in lines if line.kind == "call"]
        assert len(calls) == sum(" = " in line for line in step.text.splitlines())
        assert all(line.op for line in calls)
        assert sum(line.kind == "head" for line in lines) == 2
        named = {line.id for line in lines}
        for line in calls:
            assert {name for name in line.references if name.startswith("%")} <= named
