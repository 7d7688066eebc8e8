"""`graphopt demo`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from graphopt.cli.completion import stream
from graphopt.cli.opening import open_program
from graphopt.cli.options import ModelOptions
from graphopt.cli.tables import times_table
from graphopt.cli.terminal import console
from graphopt.models import DEFAULT_MODEL


def command(
    prompt: Annotated[
        str, typer.Option(help="what to ask")
    ] = "What is a compiler? Answer briefly.",
    max_tokens: Annotated[int, typer.Option(help="tokens to generate")] = 64,
) -> None:
    """Fetch the built-in model (93 MB, once), compile it, and stream an answer."""
    program = open_program(DEFAULT_MODEL, ModelOptions(activations="int8"))
    console.print(Text(prompt, style="bold"))
    stream(program, program.chat_prompt(prompt), max_tokens=max_tokens)
    console.print(program.report.table())
    console.print(times_table(program))
