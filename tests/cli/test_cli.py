"""The command line, in-process on a tiny model folder."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from helpers.tiny_models import tiny_llama
from typer.testing import CliRunner

import graphopt
from graphopt.cli import app as cli
from graphopt.cli import opening
from graphopt.cli.completion import fitting
from graphopt.errors import UnsupportedError
from graphopt.models import load

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


def test_explain(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "program"
    assert runner.invoke(cli.app, ["compile", str(folder), str(out)]).exit_code == 0
    wide = {"COLUMNS": "160"}
    for model in (folder, out):
        done = runner.invoke(cli.app, ["explain", str(model), "--pass", "fuse_attention"], env=wide)
        assert done.exit_code == 0, done.output
        assert "fuse_attention: 2 of 2 fused" in done.output
        assert "fuse_norm" not in done.output
    done = runner.invoke(cli.app, ["explain", str(out)], env=wide)
    assert "fuse_norm: 5 of 5 fused" in done.output
    assert "fold_low_bit_weights: no candidates" in done.output
    assert "remove_noops: " in done.output
    assert "aten.contiguous" not in done.output
    done = runner.invoke(cli.app, ["explain", str(out), "--pass", "remove_noops"], env=wide)
    assert "aten.contiguous" in done.output
    names = ["--pass", "fuse_mlp", "--pass", "fuse_norm"]
    done = runner.invoke(cli.app, ["explain", str(out), "--json", *names])
    assert done.exit_code == 0, done.output
    runs = json.loads(done.output)["runs"]
    assert [run["name"] for run in runs] == ["fuse_mlp", "fuse_norm"]
    assert [row["count"] for row in runs[0]["rows"]] == ["2/2"]


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "program"
    graphopt.compile(load(folder), backend="reference").save(out)
    return out


def test_dump(folder: Path, saved: Path, tmp_path: Path) -> None:
    done = runner.invoke(cli.app, ["dump", str(folder), str(tmp_path / "a"), "--check", "numerics"])
    assert done.exit_code == 0, done.output
    assert "graphopt.rms_norm" in done.output
    assert (tmp_path / "a" / "09_fuse_norm.gir").exists()
    done = runner.invoke(cli.app, ["dump", str(saved), str(tmp_path / "b")])
    assert done.exit_code == 0, done.output
    fused = Path("diffs", "09_fuse_norm.diff")
    assert (tmp_path / "b" / fused).read_text() == (tmp_path / "a" / fused).read_text()
    done = runner.invoke(
        cli.app,
        ["dump", str(saved), str(tmp_path / "c"), "--pass", "fuse_norm", "--layer", "model.norm"],
    )
    assert done.exit_code == 0, done.output
    graphs = sorted(path.name for path in (tmp_path / "c").glob("*.gir"))
    assert graphs == ["09_fuse_norm.part.gir"]
    assert len((tmp_path / "c" / graphs[0]).read_text().splitlines()) == 1
    done = runner.invoke(cli.app, ["explain", str(tmp_path / "b"), "--pass", "fuse_norm"])
    assert "fuse_norm: 5 of 5 fused" in done.output


def test_passes_are_chosen_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--disable", "fuse_mlp", "--limit", "fuse_norm=3", "--enable", "merge_qkv"]
    done = runner.invoke(cli.app, ["compile", str(folder), str(out), *options])
    assert done.exit_code == 0, done.output
    program = graphopt.load_program(out)
    counts = program.graph.op_counts()
    assert counts["graphopt.swiglu"] == 0
    assert counts["graphopt.rms_norm"] == 3
    assert program.report.sites("merge_qkv") > 0


def test_a_graph_is_edited_by_hand(folder: Path, tmp_path: Path) -> None:
    editor = tmp_path / "editor.py"
    editor.write_text(
        "import pathlib, sys\n"
        "path = pathlib.Path(sys.argv[2])\n"
        "path.write_text(path.read_text().replace(sys.argv[1].split('/')[0], "
        "sys.argv[1].split('/')[1]))\n"
    )
    generate = ["run", str(folder), "1 2 3", "--max-tokens", "1", "--backend", "reference"]
    command = f"{sys.executable} {editor}"

    def edited(rule: str, after: str = "fuse_norm") -> str:
        options = ["--edit-after", after, "--editor", f"{command} {rule}"]
        done = runner.invoke(cli.app, [*generate, *options])
        return done.output + str(done.exception)

    # The model folder has no tokenizer: the passes and the edit are over by then.
    assert "needs a tokenizer" in edited("eps=1e-06/eps=1e-05")
    assert "unknown op 'graphopt.norm'" in edited("rms_norm/norm")
    assert "is in /" in edited("rms_norm/norm")
    assert "did you mean 'fuse_norm'" in edited("a/b", "fuse_nrom")
    for options, message in (
        (["--edit-after", "fuse_norm", "--editor", "no-such-editor"], "cannot be run"),
        (["--edit-after", "fuse_norm", "--editor", "false"], "ended with status 1"),
        (["--editor", "true"], "no effect without --edit-after"),
        (["--edit-after", "fuse_norm"], "give --editor, or set EDITOR"),
    ):
        done = runner.invoke(cli.app, [*generate, *options], env={"EDITOR": "", "VISUAL": ""})
        assert message in str(done.exception), (options, done.output, done.exception)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("fuse_norm", "must be PASS=N"),
        ("fuse_norm=-1", "must be PASS=N"),
        ("fuse_nrom=1", "did you mean 'fuse_norm'"),
        ("merge_qkv=1", "not in this run"),
    ],
)
def test_bad_limits(folder: Path, tmp_path: Path, limit: str, message: str) -> None:
    for command in (["compile", str(folder), str(tmp_path / "x")], ["bisect", str(folder)]):
        done = runner.invoke(cli.app, [*command, "--limit", limit])
        assert message in str(done.exception), (command, done.output)


def test_the_backend_of_a_saved_program_can_be_chosen(saved: Path, tmp_path: Path) -> None:
    for arguments, backend in (([], "reference"), (["--backend", "cpu"], "cpu")):
        out = tmp_path / backend
        done = runner.invoke(cli.app, ["compile", str(saved), str(out), *arguments])
        assert done.exit_code == 0, done.output
        assert json.loads((out / "manifest.json").read_text())["options"]["backend"] == backend


class Speller:
    """Token = letter, encoded and decoded as it is."""

    chat_template = None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 32 for letter in text]

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return "".join("[/b]"[token % 4] for token in ids)


def test_text_is_printed_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Square brackets are markup to the console that prints the text."""
    source = replace(load(folder), tokenizer=Speller(), name="[bold]tiny[/x]")
    monkeypatch.setattr(opening, "load", lambda *_, **__: source)
    monkeypatch.setattr(opening, "compile", partial(graphopt.compile, backend="reference"))
    done = runner.invoke(cli.app, ["demo", "--prompt", "[/b] [rows]", "--max-tokens", "6"])
    assert done.exit_code == 0, done.output
    printed = done.output.splitlines()
    assert "[/b] [rows]" in printed
    assert printed[printed.index("[/b] [rows]") + 1].startswith(("[", "/", "b", "]"))
    done = runner.invoke(cli.app, ["inspect", str(folder)])
    assert "[bold]tiny[/x] (captured)" in done.output
    monkeypatch.setattr(sys, "argv", ["graphopt", "generate", "[/b]", "hi", "--top-k", "-1"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "error: top_k=-1" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["graphopt", "generate", "no[/b]such[red]", "hi"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "no[/b]such[red]" in capsys.readouterr().err


def test_a_saved_program_is_announced_as_it_is_called(saved: Path, tmp_path: Path) -> None:
    place = tmp_path / "[" / "b]"
    done = runner.invoke(cli.app, ["compile", str(saved), str(place)], env={"COLUMNS": "40"})
    assert done.exit_code == 0, done.output
    assert f"saved to {place}" in done.output
    assert runner.invoke(cli.app, ["inspect", str(place)]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "FOLDER", "--pass", "fuse_nrm"], "did you mean 'fuse_norm'"),
        (["explain", "nosuchmodel"], "nosuchmodel"),
        (["generate", "nosuchmodel", "hi"], "nosuchmodel"),
        (["inspect", "FOLDER", "--dtype", "int3"], "int3"),
        (["inspect", "FOLDER", "--weights", "thin"], "thin"),
        (["generate", "FOLDER", "hi", "--backend", "tpu"], "tpu"),
        (["generate", "FOLDER", "hi", "--temperature", "-1"], "temperature"),
        (["generate", "FOLDER", "hi"], "tokenizer"),
        (["compile", "FOLDER", "out", "--weights", "packed"], "holds dense safetensors"),
        (["generate", "SAVED", "hi", "--backend", "nonsense"], "'nonsense' is not supported"),
        (["generate", "SAVED", "hi", "--dtype", "int3"], "--dtype has no effect on"),
        (["generate", "SAVED", "hi", "--weights", "foo"], "--weights has no effect on"),
        (["generate", "SAVED", "hi", "--activations", "bar"], "--activations has no effect on"),
        (["compile", "SAVED", "out", "--dump", "D"], "--dump has no effect on"),
        (["inspect", "SAVED", "--dtype", "bfloat16"], "--dtype has no effect on"),
        (["explain", "SAVED", "--weights", "dense"], "--weights has no effect on"),
    ],
)
def test_errors_are_one_line_and_status_2(
    folder: Path,
    saved: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"FOLDER": str(folder), "SAVED": str(saved)}
    arguments = [places.get(argument, argument) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["graphopt", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    error = error[error.index("error:") :]
    # Lines are wrapped at the width of the terminal.
    assert message.replace(" ", "") in error.replace("\n", "").replace(" ", "")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("model = (\n", "is no Python"),
        ("\nraise ValueError('no weights')\n", "raised ValueError at line 2: no weights"),
        ("import no_such_module\n", "raised ModuleNotFoundError at line 1"),
    ],
)
def test_bisect_of_a_script_that_fails(script: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "case.py"
    path.write_text(script)
    with pytest.raises(UnsupportedError, match=message):
        runner.invoke(cli.app, ["bisect", str(path)], catch_exceptions=False)


def test_a_prompt_that_is_no_text(folder: Path) -> None:
    with pytest.raises(UnsupportedError, match="not valid UTF-8 at character 2"):
        runner.invoke(cli.app, ["generate", str(folder), "ab\udcff"], catch_exceptions=False)


def test_a_terminal_without_columns_still_shows_something() -> None:
    done = runner.invoke(cli.app, ["passes"], env={"COLUMNS": "0"})
    assert done.exit_code == 0
    assert "insert_kv_cache" in done.output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_on_a_full_disk_is_one_line() -> None:
    command = (
        "import sys; from graphopt.cli.app import main; sys.argv = ['graphopt', 'passes']; main()"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", command], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: the output could not be written: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("context", "length", "tokens"), [(512, 5, 128), (64, 5, 60), (8, 8, 1)])
def test_the_default_number_of_tokens_is_what_the_context_leaves(
    context: int, length: int, tokens: int
) -> None:
    program = graphopt.compile(tiny_llama(max_position_embeddings=context), backend="reference")
    assert fitting(program, [1] * length) == tokens


def test_help_lists_every_command_without_importing_it() -> None:
    code = (
        "import sys; from graphopt.cli.app import main; sys.argv = ['graphopt', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'networkx', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in cli.COMMANDS:
        assert f" {name} " in done.stdout


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_the_list_of_commands_says_what_they_say(name: str) -> None:
    module = importlib.import_module(f"graphopt.cli.{name}")
    first = " ".join(inspect.getdoc(module.command).split("\n\n")[0].split())
    assert first == cli.COMMANDS[name]
    assert runner.invoke(cli.app, [name, "--help"]).exit_code == 0


def test_a_command_that_does_not_exist() -> None:
    done = runner.invoke(cli.app, ["compil"])
    assert done.exit_code == 2
    assert "compile" in done.output


def test_importing_graphopt_imports_nothing_else() -> None:
    code = "import sys, graphopt; print(sorted({'torch', 'rich', 'networkx'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
