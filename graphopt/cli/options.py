"""Options that several commands share, and what their texts mean."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from graphopt.check.edit import Edit
from graphopt.config import Config
from graphopt.errors import GraphoptError, UnsupportedError

Model = Annotated[str, typer.Argument(help="model name, folder, .gguf file, or saved program")]
Weights = Annotated[
    str | None,
    typer.Option(
        help="packed: keep the low-bit weights of a GGUF file (its default); dense: expand them",
        show_default=False,
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help="float32 (the default) or bfloat16", show_default=False)
]
Activations = Annotated[
    str | None,
    typer.Option(help="float (the default), or int8 for faster low-bit layers", show_default=False),
]
Backend = Annotated[
    str | None,
    typer.Option(
        help="cpu or reference; default: cpu, or what the program was saved for",
        show_default=False,
    ),
]
Disable = Annotated[
    list[str] | None, typer.Option(help="a pass to leave out; can be repeated", show_default=False)
]
Enable = Annotated[
    list[str] | None,
    typer.Option(help="a pass to run as well; can be repeated", show_default=False),
]
Limit = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PASS=N",
        help="at most N rewrites of a pass, such as fuse_attention=7; can be repeated",
        show_default=False,
    ),
]
Check = Annotated[
    str | None,
    typer.Option(help="numerics: hold every pass to its tier", show_default=False),
]


def limits_in(texts: Iterable[str] | None) -> dict[str, int]:
    """`["fuse_attention=7"]` -> `{"fuse_attention": 7}`. Raises UnsupportedError."""
    limits: dict[str, int] = {}
    for text in texts or ():
        name, mark, count = text.partition("=")
        if not mark or not count.isdecimal():
            raise UnsupportedError(f"--limit {text!r} must be PASS=N, such as fuse_attention=7")
        if name in limits:
            raise UnsupportedError(f"--limit names {name!r} twice")
        limits[name] = int(count)
    return limits


def pipeline_options(
    disable: list[str] | None, enable: list[str] | None, limit: list[str] | None, check: str | None
) -> dict[str, Any]:
    """Those that were given, as arguments of `graphopt.compile`."""
    given = {"disable": disable, "enable": enable, "limits": limits_in(limit), "check": check}
    return {name: value for name, value in given.items() if value}


def edit_with(editor: str | None, console: Console) -> Edit:
    """Open the graph text in an editor, and again, with the error, while it cannot be read.

    editor: a command line; default: what VISUAL or EDITOR say. Where nobody can be asked whether to
    edit again, the text of the failed attempt stays in a file that the error names. Raises
    UnsupportedError when no editor is known.
    """
    chosen = editor or Config.from_environment().editor
    if not chosen.strip():
        raise UnsupportedError("--edit-after needs an editor: give --editor, or set EDITOR")

    def edit(text: str, error: str) -> str:
        if error:
            console.print(Text.assemble(("error:", "red"), " ", error), soft_wrap=True)
            if not sys.stdin.isatty() or not typer.confirm("Edit again?", default=True):
                raise GraphoptError(f"the edited text is in {_write(text)}: {error}")
        path = _write(text)
        try:
            command = [*shlex.split(chosen), str(path)]
            status = subprocess.call(command)
        except (OSError, ValueError) as failure:
            raise UnsupportedError(f"the editor {chosen!r} cannot be run: {failure}") from None
        if status:
            raise GraphoptError(f"the editor {chosen!r} ended with status {status}; text: {path}")
        try:
            edited = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as failure:
            raise GraphoptError(
                f"the editor {chosen!r} left no text in {path}: {failure}"
            ) from None
        path.unlink()
        return edited

    return edit


def _write(text: str) -> Path:
    with tempfile.NamedTemporaryFile(
        "w", suffix=".gir", prefix="graphopt-", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    return Path(file.name)
