"""`graphopt compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from graphopt.cli.opening import open_program
from graphopt.cli.options import Model, ModelOptions, PassOptions, takes_options
from graphopt.cli.tables import times_table
from graphopt.cli.terminal import console


@takes_options
def command(
    model: Model,
    out: Annotated[Path, typer.Argument(help="folder for the program, new or empty")],
    dump: Annotated[
        Path | None, typer.Option(help="folder to dump to, too", show_default=False)
    ] = None,
    *,
    passes: PassOptions,
    kind: ModelOptions,
) -> None:
    """Compile a model and save the program."""
    options = passes.given()
    if dump is not None:
        options["dump"] = dump
    program = open_program(model, kind, **options)
    program.save(out)
    console.print(program.report.table())
    console.print(times_table(program))
    console.print(Text(f"saved to {out}"), soft_wrap=True)
