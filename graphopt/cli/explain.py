"""`graphopt explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from graphopt.cli.opening import open_program, refuse_options
from graphopt.cli.options import Dtype, Model, ModelOptions, Weights
from graphopt.cli.terminal import console
from graphopt.inspect.explain import explain
from graphopt.program.save import is_program, load_report
from graphopt.record.dump import is_dump, read_dump


def command(
    model: Model,
    pass_: Annotated[
        list[str] | None, typer.Option("--pass", help="only this pass; can be repeated")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON, every candidate in it")] = False,
    weights: Weights = None,
    dtype: Dtype = None,
) -> None:
    """Show what passes did with every candidate: fused or rejected, where, why, what would help.

    Without --pass, a cleanup pass that applied everything is one line.
    """
    if is_dump(Path(model)):
        refuse_options(model, weights=weights, dtype=dtype)
        _, report = read_dump(model)
    elif is_program(Path(model)):
        refuse_options(model, weights=weights, dtype=dtype)
        report = load_report(model)
    else:
        kind = ModelOptions(weights=weights, dtype=dtype, backend="reference")
        report = open_program(model, kind).report
    found = explain(report, *(pass_ or ()))
    if json:
        console.out(found.to_json(), highlight=False)
        return
    for run in found.runs:
        is_brief = not pass_ and run.stage == "cleanup" and run.is_complete
        if is_brief or not run.rows:
            console.print(Text(f"{found.title(run)}: {run.summary}"))
        else:
            console.print(found.run_table(run))
