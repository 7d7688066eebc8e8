"""The data of a page against the trace and the report that they come from."""

from __future__ import annotations

from typing import Any

import pytest

from graphopt.inspect.explorer.data import page_data
from graphopt.inspect.explorer.facts import VIEW, facts
from graphopt.inspect.explorer.lines import read_lines
from graphopt.inspect.explorer.subject import subject_of
from graphopt.program.program import Program
from graphopt.record.diff import align, is_change

KIND, ID, TYPE, OP, ARGS, REFERENCES, LAYER, SOURCE, HISTORY, FLOPS, BYTES, UNIT, KERNEL = range(13)


def shown(data: dict[str, Any], entry: int) -> tuple[str, str, str]:
    """(id, op, arguments) of an entry."""
    row = data["entries"][entry]
    return row[ID], data["ops"][row[OP]], row[ARGS]


def test_steps_are_the_trace(program: Program, data: dict[str, Any]) -> None:
    assert [step["name"] for step in data["steps"]] == [s.name for s in program.trace.steps]
    for step, trace in zip(data["steps"], program.trace.steps, strict=True):
        lines = read_lines(trace.text)
        assert [shown(data, entry) for entry in step["lines"]] == [
            (line.id, line.op, line.args) for line in lines
        ]


def test_rows_are_the_alignment(program: Program, data: dict[str, Any]) -> None:
    steps = program.trace.steps
    for before, after, step in zip(steps, steps[1:], data["steps"][1:], strict=False):
        pairs = align(before.text, after.text)
        flat = step["rows"]
        assert len(flat) == 2 * len(pairs)
        for (left, right), a, b in zip(pairs, flat[::2], flat[1::2], strict=True):
            assert (left is None, right is None) == (a < 0, b < 0)
            for text, entry in ((left, a), (right, b)):
                if text is not None:
                    (line,) = read_lines(text)
                    assert shown(data, entry) == (line.id, line.op, line.args)
    assert any(is_change(pair) for pair in pairs)


def test_a_line_that_stays_is_one_entry(data: dict[str, Any]) -> None:
    total = sum(len(step["lines"]) for step in data["steps"])
    assert len(data["entries"]) < total / 2


def test_passes_name_the_step_they_made_and_found(program: Program, data: dict[str, Any]) -> None:
    found = {record["name"]: record for record in data["passes"]}
    assert found["dead_code"]["step"] is None
    norm, steps = found["fuse_norm"], data["steps"]
    assert steps[norm["step"]]["name"] == "fuse_norm"
    assert steps[norm["basis"]]["name"] == "fuse_mlp"
    assert norm["sites"] == 9
    assert norm["after"] == sum(
        data["entries"][entry][KIND] == "call" for entry in steps[norm["step"]]["lines"]
    )
    assert [r["name"] for r in data["passes"]] == [r.name for r in program.report.passes]


def test_candidates_stand_at_their_lines(data: dict[str, Any]) -> None:
    for record, found in zip(data["passes"], data["explain"], strict=True):
        for row in found["rows"]:
            for _node, layer, _text, _blocker, site, entry, step in row["members"]:
                if not layer:
                    continue
                line = data["entries"][entry]
                assert entry in data["steps"][step]["lines"]
                assert data["layers"][line[LAYER]].startswith(layer.rpartition(".")[0])
                if step == record["step"]:
                    assert site in line[HISTORY]
    (norms,) = [e for r, e in zip(data["passes"], data["explain"], strict=True)
                if r["name"] == "fuse_norm"]  # fmt: skip
    assert norms["summary"] == "9 of 9 fused"
    made = {shown(data, m[5])[1] for row in norms["rows"] for m in row["members"]}
    assert made == {"graphopt.rms_norm"}


def test_a_rejected_candidate_stands_at_its_own_line(rejected: Program) -> None:
    data = page_data(subject_of(rejected))
    members = [
        member
        for found in data["explain"]
        for row in found["rows"]
        if row["outcome"] == "rejected"
        for member in row["members"]
    ]
    assert [shown(data, member[5])[1] for member in members] == ["aten.softmax.int"]


def test_costs_are_those_of_the_sizes(data: dict[str, Any]) -> None:
    step = data["steps"][0]["lines"]
    linear = next(
        data["entries"][entry]
        for entry in step
        if data["layers"][data["entries"][entry][LAYER]] == "model.layers.0.mlp.gate_proj"
    )
    # 2 sequences of 32 tokens, hidden 64, intermediate 96.
    assert linear[FLOPS] == 2 * 64 * 64 * 96
    assert linear[BYTES] == 4 * (64 * 64 + 64 * 96 + 96 * 64)
    assert data["units"][linear[UNIT]] == "f32"


def test_kernels_of_the_last_graph(data: dict[str, Any]) -> None:
    last = [data["entries"][entry] for entry in data["steps"][-1]["lines"]]
    kernels = {data["ops"][row[OP]]: data["kernels"][row[KERNEL]] for row in last}
    assert kernels["graphopt.rms_norm"] == "native rms_norm"
    assert kernels["graphopt.kv_write"] == "native kv_write"
    assert kernels["aten.transpose.int"] == VIEW
    first = [data["entries"][entry] for entry in data["steps"][0]["lines"]]
    assert {row[KERNEL] for row in first} == {0}


def test_a_text_that_cannot_be_read_back_has_no_facts() -> None:
    text = 'gir 1\ngraph "g" captured\ninput %x : f32[2] user\nreturn %x\n'
    assert facts(text, 1, 8, "cpu") == []
    assert facts("gir 1\n%0 : f32[2] = mine.op(%x)\n", 1, 8, "cpu") == []


@pytest.mark.parametrize("size", [{"batch": 3}, {"sequence": 64}])
def test_sizes_change_costs_only(program: Program, data: dict[str, Any], size: Any) -> None:
    other = page_data(subject_of(program), **{"batch": 2, "sequence": 32, **size})
    assert [len(s["lines"]) for s in other["steps"]] == [len(s["lines"]) for s in data["steps"]]
    totals = [sum(row[FLOPS] or 0 for row in found["entries"]) for found in (data, other)]
    assert totals[1] > totals[0]
