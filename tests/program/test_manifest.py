"""manifest.json: every entry is checked before it is used."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.file_kinds import KINDS, put
from helpers.tiny_models import CausalConvolution, tiny_llama

import graphopt
from graphopt.errors import ProgramFormatError, UnsupportedError
from graphopt.ir.limits import Limit
from graphopt.program.manifest import read_manifest
from graphopt.program.program import Program
from graphopt.runtime import SamplingParams


@pytest.fixture(scope="module")
def program() -> Program:
    return graphopt.compile(tiny_llama(layers=1), backend="reference")


@pytest.fixture(scope="module")
def saved(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "p"
    program.save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "p"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_what_was_written_is_read(program: Program, saved: Path) -> None:
    manifest = read_manifest(saved)
    assert manifest.options == program.options
    assert (manifest.refusal, manifest.serving) == (None, True)


def test_a_program_of_before_there_were_default_settings(folder: Path) -> None:
    edit(folder, lambda m: m["options"].pop("default_sampling"))
    assert read_manifest(folder).options.default_sampling == SamplingParams()


def test_default_settings_are_kept(program: Program, tmp_path: Path) -> None:
    wanted = SamplingParams(temperature=0.5, bad_words_ids=((1, 2), (3,)), stop=("x",))
    options = program.options
    try:
        program.options = replace(options, default_sampling=wanted)
        program.save(tmp_path / "p")
    finally:
        program.options = options
    assert read_manifest(tmp_path / "p").options.default_sampling == wanted


def test_the_limits_and_the_refusal_are_kept(tmp_path: Path) -> None:
    graph = graphopt.capture(CausalConvolution().eval(), torch.ones((2, 8), dtype=torch.int64))
    graph.limits = (Limit("sequence", "<=", 9, "op", "m.py:3"),)
    program = graphopt.compile(graph)
    program.save(tmp_path / "p")
    manifest = read_manifest(tmp_path / "p")
    assert (manifest.refusal, manifest.serving) == (program.refusal, False)
    assert graphopt.load_program(tmp_path / "p").limits == graph.limits


def test_limits_of_an_older_program_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    graph = graphopt.capture(CausalConvolution().eval(), torch.ones((2, 8), dtype=torch.int64))
    graphopt.compile(graph).save(folder)
    edit(folder, lambda m: m.update(limits={"sequence": 9}))
    assert graphopt.load_program(folder).graph.limits == (Limit("sequence", "<=", 9),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(files=list(m["files"])), "'files' is missing or of another type"),
        (lambda m: m.update(format="1"), "'format' is missing or of another type"),
        (lambda m: m.pop("options"), "'options' is missing"),
        (lambda m: m["options"].update(foo=1), "options has an unknown entry 'foo'"),
        (lambda m: m["options"].pop("backend"), "options has no 'backend'"),
        (lambda m: m["options"].update(name=3), "options has name=3"),
        (lambda m: m["options"].update(kv_dtype="float8"), "kv_dtype='float8'"),
        (lambda m: m["options"].update(kv_dtype=[]), r"kv_dtype=\[\]"),
        (lambda m: m["options"].update(max_context="64"), "max_context='64'"),
        (lambda m: m["options"].update(max_context=0), "max_context=0"),
        (lambda m: m["options"].update(eos_token_ids=None), "eos_token_ids=None"),
        (lambda m: m["options"].update(eos_token_ids="ab"), "eos_token_ids='ab'"),
        (lambda m: m["options"].update(eos_token_ids=[1.5]), r"eos_token_ids=\[1.5\]"),
        (lambda m: m["options"].update(default_sampling=1), "default_sampling=1"),
        (lambda m: m["options"].update(default_sampling={"a": 1}), "default_sampling={'a': 1}"),
        (
            lambda m: m["options"]["default_sampling"].update(temperature=-1),
            "default_sampling=.*'temperature': -1",
        ),
        (lambda m: m.update(refusal={"a": 1}), "refusal has an unknown entry 'a'"),
        (lambda m: m.update(refusal={"code": "x"}), "refusal has no 'text'"),
        (lambda m: m.update(refusal="no"), "refusal is 'no'"),
        (lambda m: m.update(limits=[3]), r"limits is \[3\]"),
        (lambda m: m.update(limits={"sequence": "3"}), "limits is {'sequence': '3'}"),
        (lambda m: m["files"].pop("weights.safetensors"), "weights.safetensors is not listed"),
    ],
)  # fmt: skip
def test_wrong_entries_are_named(folder: Path, change: Any, message: str) -> None:
    edit(folder, change)
    with pytest.raises(ProgramFormatError, match=message):
        graphopt.load_program(folder)


def test_files_that_are_gone_without_a_trace(folder: Path) -> None:
    for name in ("serving.gir", "forward.gir"):
        edit(folder, lambda m, name=name: m["files"].pop(name))
        (folder / name).unlink()
        with pytest.raises(ProgramFormatError, match=f"is incomplete: {name} is missing"):
            graphopt.load_program(folder)


def test_a_manifest_without_the_newer_entries_is_read(folder: Path) -> None:
    edit(folder, lambda m: m.pop("serving"))
    assert graphopt.load_program(folder).generate([1, 2], max_tokens=2)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"[]", b"{}", None])
def test_a_manifest_that_is_none(folder: Path, content: bytes | None) -> None:
    path = folder / "manifest.json"
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ProgramFormatError, match="damaged"):
        graphopt.load_program(folder)


def test_a_file_is_no_program(folder: Path) -> None:
    with pytest.raises(ProgramFormatError, match="is no saved program"):
        graphopt.load_program(folder / "forward.gir")


def test_a_graph_text_that_is_no_text(folder: Path) -> None:
    (folder / "forward.gir").write_bytes(b"\xff\xfe")
    digest = hashlib.sha256(b"\xff\xfe").hexdigest()
    edit(folder, lambda m: m["files"].update({"forward.gir": digest}))
    with pytest.raises(ProgramFormatError, match=r"forward\.gir is damaged"):
        graphopt.load_program(folder)


def test_a_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer").mkdir()
    digest = hashlib.sha256(b"{").hexdigest()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "tokenizer" / name).write_text("{")
        edit(folder, lambda m, n=name: m["files"].update({f"tokenizer/{n}": digest}))
    with pytest.raises(ProgramFormatError, match=r"the tokenizer of .* could not be read"):
        graphopt.load_program(folder)


def test_the_options_of_loading_are_checked(folder: Path) -> None:
    with pytest.raises(UnsupportedError, match="'tpu' is not supported"):
        graphopt.load_program(folder, backend="tpu")
    with pytest.raises(UnsupportedError, match="threads='2'"):
        graphopt.load_program(folder, threads="2")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="an option of backend='cpu'"):
        graphopt.load_program(folder, threads=2)
    assert graphopt.load_program(folder, backend="cpu", threads=2).options.backend == "cpu"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["manifest.json", "forward.gir", "report.json", "trace/99_x.gir"])
def test_something_else_in_a_files_place(folder: Path, file: str, kind: str) -> None:
    put(kind, folder / file)
    if kind == "a folder" and file == "trace/99_x.gir":
        return
    with pytest.raises(ProgramFormatError, match=rf"{Path(file).name} .*{kind}|is missing"):
        graphopt.load_program(folder)


@pytest.mark.parametrize("file", ["manifest.json", "report.json", "tokenizer/tokenizer.json"])
def test_deep_json(folder: Path, file: str) -> None:
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text("[" * 100_000)
    digest = hashlib.sha256(b"[" * 100_000).hexdigest()
    if file != "manifest.json":
        edit(folder, lambda m: m["files"].update({file: digest}))
    with pytest.raises(ProgramFormatError, match=rf"{file} is damaged.*nested"):
        graphopt.load_program(folder)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        *(("disabled", "abc"), ("disabled", [3]), ("limits", {}), ("assumptions", [None])),
        *(("model_notes", 3), ("passes", 3), ("numerics", [{"pass_name": "x"}])),
    ],
)
def test_a_report_of_other_types(folder: Path, part: str, value: Any) -> None:
    damage_report(folder, lambda report: report.update({part: value}))
    with pytest.raises(ProgramFormatError, match=r"report\.json is damaged"):
        graphopt.load_program(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("milliseconds", "x"), ("nodes_before", 1.5), ("limit", True), ("stage", None)),
        *(("op_delta", {"x": "y"}), ("candidates", [{"node": 3, "absorbed": {"site": "x"}}])),
    ],
)
def test_a_record_of_other_types(folder: Path, name: str, value: Any) -> None:
    damage_report(folder, lambda report: report["passes"][0].update({name: value}))
    with pytest.raises(ProgramFormatError, match=r"report\.json is damaged"):
        graphopt.load_program(folder)


def damage_report(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "report.json"
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(folder, lambda m: m["files"].update({"report.json": digest}))
