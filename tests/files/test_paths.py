"""Every public function with a path takes text or a Path, and says so of anything else; a write
that fails leaves nothing behind."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.check.bisect import Bisection
from graphopt.errors import (
    GoldenError,
    GraphoptError,
    ModelNotFoundError,
    ProgramFormatError,
    UnsupportedError,
)
from graphopt.files.paths import as_path, whole_folder
from graphopt.models import load
from graphopt.program.program import Program
from graphopt.program.save import load_report
from graphopt.record.dump import Dump, read_dump
from graphopt.testing import GoldenGraph


@pytest.fixture(scope="module")
def program() -> Program:
    return graphopt.compile(nn.Linear(4, 4).eval(), torch.randn(3, 4), backend="reference")


def bisection(program: Program) -> Bisection:
    graph = program.graph
    return Bisection("p", None, None, None, "", "", 1, 0.0, graph, graph, (torch.ones(2),))


TAKERS: dict[str, tuple[Callable[[Program, Any], object], type[GraphoptError]]] = {
    "save": (lambda program, path: program.save(path), ProgramFormatError),
    "load_program": (lambda _, path: graphopt.load_program(path), ProgramFormatError),
    "load_report": (lambda _, path: load_report(path), ProgramFormatError),
    "read_dump": (lambda _, path: read_dump(path), ProgramFormatError),
    "program.dump": (lambda program, path: program.dump(path), UnsupportedError),
    "Dump": (lambda _, path: Dump(path), UnsupportedError),
    "explore": (lambda program, path: graphopt.explore(program, path), UnsupportedError),
    "explore of": (lambda _, path: graphopt.explore(path, "page.html"), UnsupportedError),
    "bisection": (lambda program, path: bisection(program).save(path), UnsupportedError),
    "golden": (lambda _, path: GoldenGraph(path), GoldenError),
    "load": (lambda _, path: load(path), ModelNotFoundError),
    "compile(dump)": (
        lambda _, path: graphopt.compile(nn.Linear(4, 4).eval(), torch.randn(3, 4), dump=path),
        UnsupportedError,
    ),
}  # fmt: skip


@pytest.mark.parametrize("value", [None, 3, b"x", "a\0b", "", ["x"]], ids=repr)
@pytest.mark.parametrize("taker", TAKERS)
def test_what_is_no_path_is_named(program: Program, taker: str, value: Any) -> None:
    take, error = TAKERS[taker]
    if taker == "compile(dump)" and value is None:
        take(program, value)
        return
    with pytest.raises(error):
        take(program, value)


def test_paths_are_text_or_path_objects() -> None:
    assert as_path("a/b", UnsupportedError) == as_path(Path("a/b"), UnsupportedError)
    with pytest.raises(UnsupportedError, match="3 is no file; give its path"):
        as_path(3, UnsupportedError, "file")


class FullDisk:
    """Path.write_bytes and write_text fail from the given file on, with half of it written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        self.left = after
        for name in ("write_bytes", "write_text"):
            monkeypatch.setattr(Path, name, self.failing(getattr(Path, name)))

    def failing(self, original: Callable[..., int]) -> Callable[..., int]:
        def write(path: Path, data: Any, **options: Any) -> int:
            if self.left:
                self.left -= 1
                return original(path, data, **options)
            original(path, data[: len(data) // 2], **options)
            raise OSError(errno.ENOSPC, "No space left on device")

        return write


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize("taker", ["program.dump", "bisection", "compile(dump)", "save"])
def test_a_full_disk_leaves_nothing(
    program: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    taker: str,
    is_new: bool,
    after: int,
) -> None:
    folder = tmp_path / "deep" / "out" if is_new else tmp_path / "out"
    if not is_new:
        folder.mkdir()
    with monkeypatch.context() as patched:
        FullDisk(patched, after)
        with pytest.raises(TAKERS[taker][1], match="No space left"):
            TAKERS[taker][0](program, folder)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert folder.exists() is not is_new
    TAKERS[taker][0](program, folder)
    assert len(list(folder.iterdir())) > 2


def test_a_dump_leaves_the_files_of_others(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with monkeypatch.context() as patched:
        FullDisk(patched, 1)
        with pytest.raises(UnsupportedError, match="nothing of it is left"):
            program.dump(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_golden_file_that_cannot_be_written_stays_as_it_was(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "linear.gir"
    old.write_text('gir 1\ngraph "old" captured\ninput %x : f32[4] user\nreturn %x\n')
    before = old.read_text()
    FullDisk(monkeypatch, 0)
    with pytest.raises(GoldenError, match=r"could not be written: .*No space left"):
        GoldenGraph(tmp_path, accept=True)(program, "linear")
    assert old.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["linear.gir"]


def test_a_page_that_cannot_be_written_stays_as_it_was(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = graphopt.explore(program, tmp_path / "page.html")
    before = page.read_text()
    FullDisk(monkeypatch, 0)
    with pytest.raises(UnsupportedError, match="cannot be written"):
        graphopt.explore(program, page)
    assert page.read_text() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_other_errors_pass_and_leave_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with whole_folder(tmp_path / "a" / "b", lambda error: UnsupportedError(str(error))):
            (tmp_path / "a" / "b" / "c").mkdir()
            (tmp_path / "a" / "b" / "c" / "d").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert list(tmp_path.iterdir()) == []
