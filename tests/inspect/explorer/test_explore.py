"""`graphopt.explore` and the command: what it takes, what it refuses, what it writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import tiny_llama
from typer.testing import CliRunner

import graphopt
from graphopt.cli import app as cli
from graphopt.errors import GraphoptError, ModelNotFoundError, NoRecordError, UnsupportedError
from graphopt.inspect.explorer.page import MARKER
from graphopt.program.program import Program
from graphopt.record.dump import Dump

runner = CliRunner()


def body(file: Path) -> str:
    """The page without the numbers of this run: times, and the policy's hashes."""
    return re.sub(r'"(verify_)?ms":[\d.e-]+', "", file.read_text(encoding="utf-8"))


def test_program_saved_program_and_dump_give_one_page(program: Program, tmp_path: Path) -> None:
    program.save(tmp_path / "program")
    program.dump(tmp_path / "dump")
    subjects = [program, tmp_path / "program", str(tmp_path / "dump")]
    pages = [
        body(graphopt.explore(subject, tmp_path / f"{i}.html"))
        for i, subject in enumerate(subjects)
    ]
    assert pages[0] == pages[1] == pages[2]


def test_the_page_needs_nothing_else(page_file: Path) -> None:
    text = page_file.read_text(encoding="utf-8")
    code = re.sub(r"/\*!.*?\*/", "", text, flags=re.DOTALL)
    assert not re.search(r"<(link|img|iframe)\b|\bsrc=|@import|url\(", code.partition("<script")[0])
    # Addresses are names in d3 (XML namespaces), never something that is fetched.
    assert set(re.findall(r"https?://[\w.]+", code)) <= {"http://www.w3.org", "https://d3js.org"}
    assert "default-src 'none'" in text
    assert "sourceMappingURL" not in text
    assert "Permission is hereby granted" in text


def test_a_model_folder_is_compiled(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    out = tmp_path / "page.html"
    done = runner.invoke(cli.app, ["explore", str(tmp_path / "model"), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "open it in a browser" in done.output
    assert MARKER in out.read_text(encoding="utf-8")[:200]
    # A page is replaced by a page.
    assert (
        runner.invoke(cli.app, ["explore", str(tmp_path / "model"), "-o", str(out)]).exit_code == 0
    )


def test_another_file_is_kept_unless_forced(program: Program, tmp_path: Path) -> None:
    out = tmp_path / "thesis.html"
    out.write_text("mine")
    with pytest.raises(UnsupportedError, match="--force"):
        graphopt.explore(program, out)
    assert out.read_text() == "mine"
    graphopt.explore(program, out, force=True)
    assert MARKER in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("out", "match"), [("no/such/page.html", "there is no folder"), (".", "is a folder")]
)
def test_places_that_cannot_be_written(
    program: Program, tmp_path: Path, out: str, match: str
) -> None:
    with pytest.raises(UnsupportedError, match=match):
        graphopt.explore(program, tmp_path / out)


def test_subjects_that_are_none(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnsupportedError, match="neither a saved program, nor a dump, nor a model"):
        graphopt.explore(tmp_path / "empty", out)
    with pytest.raises(ModelNotFoundError, match="missing"):
        graphopt.explore(tmp_path / "missing", out)
    with pytest.raises(UnsupportedError, match="not a int"):
        graphopt.explore(3, out)  # type: ignore[arg-type]
    assert not out.exists()


def test_a_subject_without_a_trace(program: Program, tmp_path: Path) -> None:
    program.dump(Dump(tmp_path / "dump", layers=("model.layers.0",)))
    with pytest.raises(NoRecordError, match="dump with filters"):
        graphopt.explore(tmp_path / "dump", tmp_path / "page.html")


@pytest.mark.parametrize("size", [{"batch": 0}, {"sequence": -1}])
def test_sizes_below_one(program: Program, tmp_path: Path, size: dict[str, int]) -> None:
    with pytest.raises(GraphoptError, match="give 1 to "):
        graphopt.explore(program, tmp_path / "page.html", **size)  # type: ignore[arg-type]


def test_a_model_without_numbered_layers_or_cache(
    projection: torch.nn.Module, tmp_path: Path
) -> None:
    program = graphopt.compile(projection, torch.randn(2, 8), serving="off")
    assert graphopt.explore(program, tmp_path / "page.html").stat().st_size < 1e6
