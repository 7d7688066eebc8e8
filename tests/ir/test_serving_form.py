"""Serving graphs that were changed by hand: refused before anything runs."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import tiny_llama

import graphopt
from graphopt.codegen.cpu.build import load_library
from graphopt.codegen.reference import ReferenceBackend
from graphopt.errors import GraphoptError, ProgramFormatError, VerifyError
from graphopt.ir.text.parser import parse_graph
from graphopt.ir.text.printer import print_graph
from graphopt.ir.verify import verify
from graphopt.program.program import Program


@pytest.fixture(scope="module")
def program() -> Program:
    return graphopt.compile(tiny_llama(layers=1), backend="reference")


CHANGES = [
    (r"(input %tokens .*\n)(input %positions .*\n)", r"\2\1", "begin"),
    (r"input %kv_lens : i64", "input %kv_lens : i32", "kv_lens is torch.int32, not torch.int64"),
    (r"block_columns\]", "others]", r"%block_tables is not i64\[requests, block_columns\]"),
    (r"input %kv_lens : i64\[requests\]", "input %kv_lens : i64[rows]", r"is not i64\[requests\]"),
    (r"(input %k_cache_0 .*) cache", r"\1 user", "which is no cache input"),
    (r"input %v_cache_0 .* cache\n", "", "not defined"),
    (r"16\] cache", "16, 2] cache", "does not type-check"),
    (r"graphopt\.kv_write\((.*), %slots\)", r"graphopt.kv_write(\1, %tokens)", "'slots'"),
    (r"(paged_attention\(.*), %kv_lens", r"\1, %query_start", "."),
    (r"(paged_attention\(.*)\)  #", r"\1, window=-1)  #", r"window=-1 must be 0 or more"),
    (r"(paged_attention\(.*scale=)[\d.]+", r"\1float.nan", "no number to compute with"),
    (r"(rms_norm\(.*), @model\.norm\.weight", r"\1, @model.embed_tokens.weight", "has 1 axis"),
    (r"graphopt\.swiglu\((%\d+), (%\d+)\)", r"graphopt.swiglu(\1, %tokens)", "not a float"),
    (r"return (%\d+)", r"return \1, \1", "alone"),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "replacement", "message"), CHANGES)
def test_a_changed_graph_is_refused(
    program: Program, pattern: str, replacement: str, message: str
) -> None:
    assert program.serving is not None
    text, count = re.subn(pattern, replacement, print_graph(program.serving), count=1)
    if not count:
        pytest.skip("the graph has no such line")
    with pytest.raises((ProgramFormatError, VerifyError), match=message):
        verify(parse_graph(text, program.serving.weights))


def test_a_changed_program_with_new_hashes_is_refused(program: Program, tmp_path: Path) -> None:
    program.save(tmp_path / "p")
    path = tmp_path / "p" / "serving.gir"
    text = re.sub(r"return (%\d+)", r"return \1, \1", path.read_text())
    path.write_text(text)
    manifest = tmp_path / "p" / "manifest.json"
    data = json.loads(manifest.read_text())
    data["files"]["serving.gir"] = hashlib.sha256(text.encode()).hexdigest()
    manifest.write_text(json.dumps(data))
    with pytest.raises(ProgramFormatError, match=r"serving\.gir is damaged: .*alone"):
        graphopt.load_program(tmp_path / "p")
    # A graph of the other kind in its place.
    path.write_text((tmp_path / "p" / "forward.gir").read_text())
    data["files"]["serving.gir"] = data["files"]["forward.gir"]
    manifest.write_text(json.dumps(data))
    with pytest.raises(ProgramFormatError, match=r"it is a captured graph, not serving"):
        graphopt.load_program(tmp_path / "p")


def test_what_an_op_refuses_as_it_runs_is_told() -> None:
    text = (
        'gir 1\ngraph "t" captured\ninput %x : f32[batch, sequence] user\n'
        "%0 : f32[batch, sequence] = aten.add.Tensor(%x, %x)\n"
        "%1 : i64[batch, sequence] = aten.to.dtype(%0, dtype.i64)\n"
        "%2 : f32[batch, sequence] = aten.gather(%x, 1, %1)\n"
        "return %2\n"
    )
    graph = parse_graph(text, {})
    verify(graph)
    with pytest.raises(GraphoptError, match="t could not be run: RuntimeError"):
        ReferenceBackend().lower(graph)(torch.full((2, 3), 99.0))


def test_rows_of_a_cache_op_are_the_steps(program: Program) -> None:
    """A kernel goes by the step's token rows; other rows would lie beside its operands."""
    from graphopt.codegen.cpu.backend import CpuBackend

    assert program.serving is not None
    graph = program.serving
    text = print_graph(graph)
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if "graphopt.kv_write" in line)
    number, _, rest = lines[at].partition(" : ")
    key = rest.split("(")[1].split(", ")[2]
    picked = "%9000 : f32[1, 2, logit_rows, 16] = aten.index_select(" + f"{key}, 2, %logit_rows)"
    lines[at] = lines[at].replace(f"{key}, ", "%9000, ", 1)
    lines.insert(at, picked)
    changed = parse_graph("\n".join([*lines, ""]), graph.weights)
    notes: list[str] = []
    backend = CpuBackend(load_library(), note=notes.append)
    backend.lower_serving(changed, None, None)
    assert "does not work on the token rows of the step" in notes[0]
    assert number.startswith("%")
