"""Dumps: what is written, what is left out, what is never touched."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.file_kinds import KINDS, put
from helpers.tiny_models import tiny_llama

import graphopt
from graphopt import Dump
from graphopt.errors import (
    ExpectationError,
    GraphoptError,
    NoRecordError,
    PassError,
    ProgramFormatError,
    UnsupportedError,
    VerifyError,
)
from graphopt.ir.graph import Graph
from graphopt.ir.text.parser import first_difference, parse_graph
from graphopt.passes.base import Pass
from graphopt.record.dump import read_dump
from graphopt.record.report import PassRecord
from graphopt.record.trace import Trace, check_round_trip


@pytest.fixture(scope="module")
def model() -> Graph:
    return graphopt.capture(tiny_llama(layers=3))


@pytest.fixture(scope="module")
def program(model: Graph) -> graphopt.Program:
    return graphopt.compile(model)


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_dump_has_a_file_for_each_pass_that_changed_something(
    model: Graph, tmp_path: Path
) -> None:
    program = graphopt.compile(model, dump=tmp_path / "new" / "dump")
    folder = tmp_path / "new" / "dump"
    changed = {
        f"{number:02d}_{record.name}"
        for number, record in enumerate(program.report.passes, start=1)
        if record.sites or record.nodes_before != record.nodes_after
    }
    graphs = {name.removesuffix(".gir") for name in files(folder) if name.endswith(".gir")}
    assert graphs == changed | {"00_capture"}
    assert len(changed) < len(program.report.passes)
    assert {name[6:-5] for name in files(folder) if name.startswith("diffs/")} == changed
    summary = (folder / "summary.txt").read_text()
    for record in program.report.passes:
        assert re.search(rf"^{record.name} .* {len(record.sites)} ", summary, re.MULTILINE)
    assert "+7 graphopt.rms_norm" in summary
    assert "{0-2} x3 @@" in (folder / "diffs" / "09_fuse_norm.diff").read_text()
    kernels = (folder / "kernels" / "serving.txt").read_text()
    assert re.search(r"^%\d+ +native +rms_norm +model\.layers\.2\.input_layernorm$", kernels, re.M)
    serving = parse_graph((folder / f"{max(changed)}.gir").read_text(), program.weights())
    assert program.serving is not None
    assert first_difference(serving, program.serving) is None


def test_the_manifest_lists_every_file_by_hash(model: Graph, tmp_path: Path) -> None:
    graphopt.compile(model, dump=tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert set(manifest["files"]) | {"manifest.json"} == files(tmp_path)
    assert manifest["name"] == "LlamaForCausalLM"
    assert manifest["failure"] == ""


def test_a_loaded_program_shows_the_same(program: graphopt.Program, tmp_path: Path) -> None:
    program.save(tmp_path / "program")
    loaded = graphopt.load_program(tmp_path / "program")
    assert loaded.trace == program.trace
    program.dump(tmp_path / "first")
    loaded.dump(tmp_path / "second")
    names = files(tmp_path / "first")
    assert names == files(tmp_path / "second")
    for name in names - {"manifest.json", "summary.txt", "report.json.gz"}:
        assert (tmp_path / "first" / name).read_text() == (tmp_path / "second" / name).read_text()


def test_a_dump_is_read_back(program: graphopt.Program, tmp_path: Path) -> None:
    program.dump(tmp_path)
    trace, report = read_dump(tmp_path)
    assert trace == program.trace
    assert report.to_dict() == program.report.to_dict()
    assert report.seconds == program.report.seconds


def test_filters(model: Graph, program: graphopt.Program, tmp_path: Path) -> None:
    graphopt.compile(model, dump=Dump(tmp_path / "passes", passes=("fuse_norm",)))
    kept = {name for name in files(tmp_path / "passes") if name.endswith((".gir", ".diff"))}
    assert kept == {"09_fuse_norm.gir", "diffs/09_fuse_norm.diff"}
    summary = (tmp_path / "passes" / "summary.txt").read_text()
    assert re.search(r"^fuse_rope .* not dumped ", summary, re.MULTILINE)
    assert re.search(r"^dead_code .* unchanged", summary, re.MULTILINE)
    program.dump(Dump(tmp_path / "layers", layers=("model.layers.1",), ops=("graphopt.*",)))
    part = (tmp_path / "layers" / "09_fuse_norm.part.gir").read_text().splitlines()
    assert len(part) == 4
    for line in part:
        assert re.search(r"= graphopt\.\w+\(.*# model\.layers\.1\.", line), line
    diff = tmp_path / "layers" / "diffs" / "13_insert_kv_cache.diff"
    assert not diff.exists() or "model.layers.2." not in diff.read_text()
    assert not list((tmp_path / "layers").glob("??_*[a-z].gir")) or all(
        p.name.endswith(".part.gir") for p in (tmp_path / "layers").glob("*.gir")
    )


def test_a_filter_that_matches_nothing_is_told(
    program: graphopt.Program, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program.dump(Dump(tmp_path, layers=("model.layer.1",), ops=("graphopt.rms_norm",)))
    told = "dump: no line of these graphs matches layers='model.layer.1'"
    assert [record.getMessage() for record in caplog.records] == [told]
    assert f"note: {told}\n" in (tmp_path / "summary.txt").read_text()
    assert not program.report.notes


@pytest.mark.parametrize(
    ("dump", "error", "message"),
    [
        (3, UnsupportedError, "supported: a folder, a Dump"),
        ("", UnsupportedError, "supported: a folder"),
        (Dump(Path("x"), passes=("fuse_nrom",)), PassError, "fuse_nrom.*passes of this run"),
        (Dump(Path("x"), passes=("merge_qkv",)), PassError, "passes of this run"),
        ("/dev/null/dump", UnsupportedError, "cannot be used"),
    ],
)
def test_bad_dumps_are_refused_before_the_model_is_touched(
    dump: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        graphopt.compile(torch.nn.Linear(1, 1), dump=dump)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"folder": ""}, "'' is no folder"),
        ({"passes": "fuse_norm"}, "Dump.passes="),
        ({"layers": None}, "Dump.layers="),
    ],
)
def test_bad_filters_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        Dump(**{"folder": Path("x"), **bad})


def test_a_second_dump_replaces_the_first_and_nothing_else(
    program: graphopt.Program, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "diffs").mkdir()
    (tmp_path / "diffs" / "my.patch").write_text("mine")
    program.dump(tmp_path)
    first = files(tmp_path)
    program.dump(Dump(tmp_path, passes=("fuse_norm",)))
    second = files(tmp_path)
    assert second < first
    assert {"notes.txt", "diffs/my.patch"} < second


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("05_my_graph.gir", "is in the way"),
        ("summary.txt", "is in the way"),
        ("manifest.json", "is in the way"),
    ],
)
def test_a_file_of_somebody_else_is_never_overwritten(
    program: graphopt.Program, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UnsupportedError, match=message):
        program.dump(tmp_path)
    assert files(tmp_path) == {name}
    assert (tmp_path / name).read_text() == "{}"


def test_a_dump_file_that_was_edited_is_never_overwritten(
    program: graphopt.Program, tmp_path: Path
) -> None:
    program.dump(tmp_path)
    edited = tmp_path / "00_capture.gir"
    edited.write_text(edited.read_text() + "\n")
    before = files(tmp_path)
    with pytest.raises(UnsupportedError, match=r"00_capture\.gir was changed since"):
        program.dump(tmp_path)
    assert files(tmp_path) == before


def test_a_saved_program_is_no_dump_folder(program: graphopt.Program, tmp_path: Path) -> None:
    program.save(tmp_path / "saved")
    with pytest.raises(UnsupportedError, match=r"manifest\.json is in the way"):
        program.dump(tmp_path / "saved")
    graphopt.load_program(tmp_path / "saved")
    with pytest.raises(ProgramFormatError, match="no dump"):
        read_dump(tmp_path / "saved")


class _Breaks:
    """An instrument that leaves a graph broken after one pass."""

    def before(self, pass_: Pass[Any], graph: Graph) -> None:
        """Break it just before fuse_norm, which the verifier sees after it."""
        if pass_.name == "fuse_norm":
            del graph.calls(torch.ops.aten.linear.default)[0].meta["layer"]

    def after(self, pass_: Pass[Any], graph: Graph, record: PassRecord) -> None:
        """Nothing."""


def test_a_layer_that_is_like_others_has_its_own_diff(
    program: graphopt.Program, tmp_path: Path
) -> None:
    program.dump(Dump(tmp_path, layers=("model.layers.1",)))
    diff = (tmp_path / "diffs" / "09_fuse_norm.diff").read_text()
    assert diff.startswith("--- 08_fuse_mlp.gir\n+++ 09_fuse_norm.gir\n@@ model.layers.1 @@\n")
    assert diff.count("\n+%") == 2


def test_a_failure_after_the_passes_leaves_a_whole_dump(model: Graph, tmp_path: Path) -> None:
    with pytest.raises(ExpectationError):
        graphopt.compile(model, dump=tmp_path, expect={"fuse_norm": 3})
    assert json.loads((tmp_path / "manifest.json").read_text())["failure"]
    assert not list(tmp_path.glob("*.failed.gir"))
    trace, _ = read_dump(tmp_path)
    graphopt.compile(model, dump=tmp_path)
    assert read_dump(tmp_path)[0] == trace


def test_a_model_that_cannot_be_captured_leaves_the_earlier_dump(
    program: graphopt.Program, tmp_path: Path
) -> None:
    program.dump(tmp_path)
    with pytest.raises(GraphoptError):
        graphopt.compile(torch.nn.Linear(1, 1).eval(), torch.ones(3, 3), dump=tmp_path)
    assert read_dump(tmp_path)[0] == program.trace


@pytest.mark.parametrize("blocked", ["diffs", "summary.txt/"])
def test_folders_and_files_of_the_other_kind_are_in_the_way(
    program: graphopt.Program, tmp_path: Path, blocked: str
) -> None:
    path = tmp_path / blocked.rstrip("/")
    path.mkdir() if blocked.endswith("/") else path.write_text("mine")
    with pytest.raises(UnsupportedError, match="in the way"):
        program.dump(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_numeric_errors_are_kept_by_saved_programs(model: Graph, tmp_path: Path) -> None:
    program = graphopt.compile(model, check="numerics")
    program.save(tmp_path / "program")
    loaded = graphopt.load_program(tmp_path / "program")
    assert loaded.report.numerics == program.report.numerics


def test_a_failing_pass_leaves_a_dump_up_to_it(model: Graph, tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="has no 'layer'"):
        graphopt.compile(model, dump=tmp_path, instruments=[_Breaks()])
    assert (tmp_path / "08_fuse_mlp.gir").exists()
    assert not (tmp_path / "09_fuse_norm.gir").exists()
    assert "FAILED: fuse_norm: VerifyError" in (tmp_path / "summary.txt").read_text()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["failure"].startswith("fuse_norm: VerifyError")


def test_the_environment_dumps(
    model: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHOPT_DUMP", str(tmp_path / "env"))
    graphopt.compile(model)
    assert (tmp_path / "env" / "summary.txt").exists()
    graphopt.compile(model, dump=tmp_path / "given")
    assert (tmp_path / "given" / "summary.txt").exists()


def test_numeric_errors_are_in_the_summary(model: Graph, tmp_path: Path) -> None:
    program = graphopt.compile(model, dump=tmp_path, check="numerics")
    rows = (tmp_path / "summary.txt").read_text().splitlines()
    errors = [re.search(r"\d\.\de[-+]\d\d", row) for row in rows if re.match(r"\w+_\w+ ", row)]
    found = [change.max_relative for change in program.report.numerics]
    assert len(found) == len(program.report.passes)
    assert [error[0] for error in errors if error] == [f"{change:.1e}" for change in found]


def test_an_old_program_without_a_trace_says_so(model: Graph, tmp_path: Path) -> None:
    program = graphopt.compile(model)
    program.trace = Trace()
    with pytest.raises(NoRecordError, match="compile it again"):
        program.dump(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_round_trip_check_can_fail(program: graphopt.Program) -> None:
    text = program.trace.steps[-1].text
    assert program.serving is not None
    graph = program.serving.copy()
    graph.weights = dict(program.weights())
    check_round_trip(graph, text, "last")
    with pytest.raises(VerifyError, match="reads back differently"):
        check_round_trip(graph, text.replace("scale=0.25", "scale=0.125", 1), "last")
    with pytest.raises(VerifyError, match="does not read back"):
        check_round_trip(graph, text.replace("graphopt.rope", "graphopt.ropes", 1), "last")


@pytest.mark.parametrize(
    "data",
    [b"", b"x" * 50, gzip.compress(b"[" * 100_000), gzip.compress(b"{}")[:-9] + b"x" * 9],
    ids=["empty", "no gzip", "too deep", "cut"],
)
def test_a_damaged_report_of_a_dump(program: graphopt.Program, tmp_path: Path, data: bytes) -> None:
    program.dump(tmp_path / "d")
    (tmp_path / "d" / "report.json.gz").write_bytes(data)
    with pytest.raises(ProgramFormatError, match=r"report\.json\.gz is "):
        read_dump(tmp_path / "d")


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_in_a_dump_in_its_place(
    program: graphopt.Program, tmp_path: Path, kind: str
) -> None:
    program.dump(tmp_path / "d")
    put(kind, tmp_path / "d" / "report.json.gz")
    with pytest.raises(ProgramFormatError, match=kind):
        read_dump(tmp_path / "d")
    put(kind, tmp_path / "d" / "manifest.json")
    with pytest.raises(ProgramFormatError, match="is no dump"):
        read_dump(tmp_path / "d")


def test_a_pipe_where_a_dump_goes(model: Graph, tmp_path: Path) -> None:
    put("a named pipe", tmp_path / "summary.txt")
    with pytest.raises(UnsupportedError, match=r"summary\.txt .* a named pipe"):
        graphopt.compile(model, dump=tmp_path)
