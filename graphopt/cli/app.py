"""The command line: `graphopt demo | generate | run | compile | dump | inspect | explain |
explore | bisect | passes`.

Each command is a module of this package, imported when it is called: `graphopt --help` does not
wait for torch. Errors that graphopt raises on purpose are printed as one line, exit status 2;
output that cannot be written (a full disk) likewise, exit status 1; anything else is a bug and
keeps its traceback.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from graphopt.cli.entry import interrupts_end
from graphopt.errors import GraphoptError

COMMANDS = {
    "demo": "Fetch the built-in model (93 MB, once), compile it, and stream an answer.",
    "generate": "Generate text with a model or a saved program.",
    "run": "Compile a model with other passes, or with the graph edited by hand, and generate "
    "with it.",
    "compile": "Compile a model and save the program.",
    "dump": "Write the graph after each pass, what the pass changed, and a summary.",
    "inspect": "Show what is in a model's or program's graph: op counts, reasons, or the whole "
    "text.",
    "explain": "Show what passes did with every candidate: fused or rejected, where, why, what "
    "would help.",
    "explore": "Write one HTML file that shows what every pass did: diffs, drawings, reasons, "
    "costs.",
    "bisect": "Find the first rewrite that makes the model compute something else.",
    "passes": "List every pass in the order it runs.",
}
"""Name of each module `graphopt.cli.<name>` and the first sentence of its command."""

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class Commands(TyperGroup):
    """The commands of `COMMANDS`; listing them imports none."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._is_listing = False
        self.commands = {name: TyperCommand(name, help=first) for name, first in COMMANDS.items()}

    # Types of typer's own copy of click, which has no public name.
    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, or only its first sentence while they are listed."""
        listed = super().get_command(ctx, cmd_name)
        if listed is None or self._is_listing:
            return listed
        with interrupts_end():
            module = importlib.import_module(f"graphopt.cli.{cmd_name}")
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(cmd_name)(module.command)
        return typer.main.get_command(single)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """`--help`."""
        self._is_listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._is_listing = False


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compile transformer models into graphs that can be seen, checked and run.",
)


@app.callback()
def options() -> None:
    """No options beside those of the commands."""


def main() -> None:
    """Entry point of the `graphopt` command."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except GraphoptError as error:
        _complain(str(error))
        sys.exit(2)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        # What is still buffered would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _complain(f"the output could not be written: {error}")
        sys.exit(1)


def _complain(message: str) -> None:
    from graphopt.cli.terminal import complain

    complain(message)
