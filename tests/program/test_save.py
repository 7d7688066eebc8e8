"""Saving: modes, what killed saves leave, paths that are none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from helpers.tiny_models import CausalConvolution
from safetensors.torch import save_file
from torch import ones

import graphopt
from graphopt.errors import ProgramFormatError, UnsupportedError
from graphopt.program import save as storage
from graphopt.program.program import Program


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

    monkeypatch.setattr("graphopt.program.save.write_manifest", fail)
    with pytest.raises(ProgramFormatError, match="could not be written: no space left"):
        program.save(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [None, 3, b"p", "a\0b", ""])
def test_paths_that_are_none(program: Program, path: Any) -> None:
    for use in (program.save, graphopt.load_program):
        with pytest.raises(ProgramFormatError, match="is no folder"):
            use(path)


DTYPES = {
    **{name: getattr(torch, f"float{name[1:]}") for name in ("F64", "F32", "F16")},
    **{name: getattr(torch, f"int{name[1:]}") for name in ("I64", "I32", "I16", "I8")},
    **{"BF16": torch.bfloat16, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


@pytest.mark.parametrize("name", dict.fromkeys((*DTYPES, *storage._DTYPES)))
def test_every_dtype_of_the_table_is_written_and_read(name: str, tmp_path: Path) -> None:
    dtype = DTYPES[name]
    assert storage._DTYPES[name] == dtype
    made = torch.tensor([[0, 1, 1], [1, 0, 0]]).to(dtype)
    save_file({"w": made}, tmp_path / "w.safetensors")
    found = storage.mapped_weights(tmp_path / "w.safetensors")["w"]
    assert (found.dtype, found.shape) == (dtype, (2, 3))
    assert torch.equal(found.view(torch.uint8), made.view(torch.uint8))
    # Memory of its own: the file stays as it is.
    found.view(torch.uint8).fill_(7)
    again = storage.mapped_weights(tmp_path / "w.safetensors")["w"]
    assert torch.equal(again.view(torch.uint8), made.view(torch.uint8))


def test_a_weight_of_a_kind_that_is_not_stored_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, dtype=torch.uint16)}, tmp_path / "w.safetensors")
    with pytest.raises(ProgramFormatError, match="holds 'w' of unknown type 'U16'"):
        storage.mapped_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (ones(2, device="meta"), "has no data"),
        (ones(2).to(torch.complex128), "cannot store; it can: dense float64"),
        (ones(2, 2).to_sparse(), "sparse"),
    ],
)
def test_weights_that_cannot_be_stored_are_named_before_anything_is_written(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: Any, message: str
) -> None:
    monkeypatch.setattr(Program, "weights", lambda self: {"odd": weight})
    with pytest.raises(ProgramFormatError, match=f"'odd' .*{message}"):
        program.save(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_share_memory_are_stored_apart() -> None:
    base = torch.arange(6.0)
    made = storage._unshared({"a": base, "b": base[:3], "c": torch.zeros(2)})
    pointers = {tensor.untyped_storage().data_ptr() for tensor in made.values()}
    assert len(pointers) == 3
    assert made["a"] is base
    assert torch.equal(made["b"], base[:3])


def test_a_program_over_an_empty_folder(program: Program, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    assert not storage.is_program(tmp_path / "p")
    program.save(tmp_path / "p")
    assert storage.is_program(tmp_path / "p")
    assert not storage.is_program(tmp_path)
    program.save(tmp_path / "deep" / "er" / "p")
    for taken in (tmp_path / "p", tmp_path / "p" / "manifest.json"):
        with pytest.raises(ProgramFormatError, match="exists and is not an empty folder"):
            program.save(taken)
    loaded = graphopt.load_program(str(tmp_path / "p"))
    assert loaded.report.seconds["read"] > 0
    assert loaded.serving is None
    assert storage.load_report(tmp_path / "p").to_dict()["passes"]


def test_a_report_that_is_damaged_or_gone(program: Program, tmp_path: Path) -> None:
    program.save(tmp_path / "p")
    (tmp_path / "p" / "report.json").write_text('{"passes": 3}')
    with pytest.raises(ProgramFormatError, match=r"report\.json .*(damaged|altered)"):
        storage.load_report(tmp_path / "p")
    with pytest.raises(ProgramFormatError, match=r"report\.json is damaged"):
        storage._read_report(tmp_path / "p")
    (tmp_path / "p" / "report.json").unlink()
    assert storage._read_report(tmp_path / "p").passes == []


def test_the_backend_of_a_loaded_program(program: Program, tmp_path: Path) -> None:
    program.save(tmp_path / "p")
    assert graphopt.load_program(tmp_path / "p").options.backend == "reference"
    assert graphopt.load_program(tmp_path / "p", backend="cpu").options.backend == "cpu"
    with pytest.raises(UnsupportedError, match="threads"):
        graphopt.load_program(tmp_path / "p", threads=2)
