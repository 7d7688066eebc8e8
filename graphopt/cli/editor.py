"""A graph text in the user's editor, between two passes."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from graphopt.check.edit import Edit
from graphopt.config import Config
from graphopt.errors import GraphoptError, UnsupportedError


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
