"""Saving: modes, what killed saves leave, paths that are none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from tiny_models import CausalConvolution
from torch import ones

import graphopt
from graphopt.errors import ProgramFormatError
from graphopt.program import Program


@pytest.fixture(scope="module")
def program() -> Program:
    return graphopt.compile(CausalConvolution().eval(), ones(2, 8).long(), backend="reference")


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_modes_are_those_of_the_umask(program: Program, tmp_path: Path, umask: None) -> None:
    program.save(tmp_path / "p")
    for path in [tmp_path / "p", *(tmp_path / "p").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def leftover(folder: Path, name: str, age: float) -> Path:
    """A folder as a save leaves it that is killed."""
    left = folder / name
    left.mkdir()
    (left / "weights.safetensors").write_bytes(b"half")
    stamp = left.stat().st_mtime - age
    os.utime(left, (stamp, stamp))
    return left


def test_what_killed_saves_left_goes_with_the_next(program: Program, tmp_path: Path) -> None:
    gone = leftover(tmp_path, ".p-0123456789ab", 100)
    young = leftover(tmp_path, ".p-00000000abcd", 0)
    mine = leftover(tmp_path, ".p-my own folder", 100)
    other = leftover(tmp_path, ".q-0123456789ab", 100)
    written = leftover(tmp_path, ".p-1111111111ff", 100)
    with FileLock(tmp_path / ".p-1111111111ff.lock"):
        program.save(tmp_path / "p")
    assert not gone.exists()
    assert all(path.exists() for path in (young, mine, other, written))
    graphopt.load_program(tmp_path / "p")
    assert list(tmp_path.glob(".p-*.lock")) == [tmp_path / ".p-1111111111ff.lock"]


def test_a_save_that_fails_leaves_nothing(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("graphopt.storage.write_manifest", fail)
    with pytest.raises(ProgramFormatError, match="could not be written: no space left"):
        program.save(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [None, 3, b"p", "a\0b", ""])
def test_paths_that_are_none(program: Program, path: Any) -> None:
    for use in (program.save, graphopt.load_program):
        with pytest.raises(ProgramFormatError, match="is no folder"):
            use(path)
