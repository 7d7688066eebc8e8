"""`graphopt inspect`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from graphopt.cli.opening import open_program
from graphopt.cli.options import Dtype, Model, ModelOptions, Weights
from graphopt.cli.terminal import console
from graphopt.ir.text.printer import print_graph
from graphopt.record.report import grouped


def command(
    model: Model,
    serving: Annotated[bool, typer.Option(help="the graph with the KV cache")] = False,
    text: Annotated[bool, typer.Option(help="print the whole graph text")] = False,
    weights: Weights = None,
    dtype: Dtype = None,
) -> None:
    """Show what is in a model's or program's graph: op counts, reasons, or the whole text."""
    program = open_program(model, ModelOptions(weights=weights, dtype=dtype, backend="reference"))
    graph = program.serving if serving else program.graph
    if graph is None:
        _ = program.executable
        return
    if text:
        console.out(print_graph(graph), highlight=False)
        return
    table = Table(title=Text(f"{graph.name} ({graph.dialect}), {graph.num_calls()} ops"))
    table.add_column("op")
    table.add_column("count", justify="right")
    for op, count in graph.op_counts().most_common():
        table.add_row(op, str(count))
    console.print(table)
    reasons = Table(title="candidates left alone")
    for heading in ("pass", "reason", "count"):
        reasons.add_column(heading)
    for record in program.report.passes:
        for reason, count in grouped(record.rejections):
            reasons.add_row(record.name, Text(reason), str(count))
    if reasons.row_count:
        console.print(reasons)
        console.print(f"[dim]graphopt explain {escape(model)} says where they are[/dim]")
