"""The command line, in-process on a tiny model folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_models import tiny_llama
from typer.testing import CliRunner

from graphopt import cli

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(path)
    return path


def test_compile_inspect_and_passes(folder: Path, tmp_path: Path) -> None:
    out, dump = tmp_path / "program", tmp_path / "dump"
    done = runner.invoke(cli.app, ["compile", str(folder), str(out), "--dump", str(dump)])
    assert done.exit_code == 0, done.output
    assert "fuse_norm" in done.output
    assert "saved to" in done.output
    assert (out / "manifest.json").exists()
    assert (dump / "00_capture.gir").exists()
    for model in (folder, out):
        done = runner.invoke(cli.app, ["inspect", str(model)])
        assert done.exit_code == 0, done.output
        assert "graphopt.rms_norm" in done.output
    done = runner.invoke(cli.app, ["inspect", str(out), "--serving", "--text"])
    assert "graphopt.paged_attention" in done.output
    assert done.output.startswith("gir 1")
    done = runner.invoke(cli.app, ["passes"])
    assert done.exit_code == 0
    assert "insert_kv_cache" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "nosuchmodel", "hi"], "nosuchmodel"),
        (["inspect", "FOLDER", "--dtype", "int3"], "int3"),
        (["inspect", "FOLDER", "--weights", "thin"], "thin"),
        (["generate", "FOLDER", "hi", "--backend", "tpu"], "tpu"),
        (["generate", "FOLDER", "hi", "--temperature", "-1"], "temperature"),
        (["generate", "FOLDER", "hi"], "tokenizer"),
    ],
)
def test_errors_are_one_line_and_status_2(
    folder: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [str(folder) if a == "FOLDER" else a for a in arguments]
    monkeypatch.setattr(sys, "argv", ["graphopt", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    error = error[error.index("error:") :]
    assert message in error.replace("\n", "")
