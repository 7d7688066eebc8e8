"""`graphopt dump`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli.opening import open_program
from graphopt.cli.options import Model, ModelOptions, PassOptions, takes_options
from graphopt.cli.terminal import console
from graphopt.program.save import is_program
from graphopt.record.dump import Dump


@takes_options
def command(
    model: Model,
    out: Annotated[Path, typer.Argument(help="folder to dump to")],
    pass_: Annotated[
        list[str] | None,
        typer.Option("--pass", help="only this pass; can be repeated", show_default=False),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="only lines of layers like model.layers.0", show_default=False),
    ] = None,
    op: Annotated[
        list[str] | None,
        typer.Option(help="only lines of ops like 'graphopt.*'", show_default=False),
    ] = None,
    *,
    passes: PassOptions,
    kind: ModelOptions,
) -> None:
    """Write the graph after each pass, what the pass changed, and a summary.

    A saved program shows what happened when it was compiled; a model is compiled.
    """
    dump = Dump(out, tuple(pass_ or ()), tuple(layer or ()), tuple(op or ()))
    options = passes.given()
    if is_program(Path(model)):
        open_program(model, kind, **options).dump(dump)
    else:
        open_program(model, kind, **options, dump=dump)
    console.out((out / "summary.txt").read_text(), highlight=False)
