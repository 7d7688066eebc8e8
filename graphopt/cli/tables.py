"""Tables that several commands print."""

from __future__ import annotations

from rich.table import Table

from graphopt.program.program import Program


def times_table(program: Program) -> Table:
    """Seconds of each stage of a compilation."""
    table = Table(title="compilation")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for stage, seconds in program.report.seconds.items():
        table.add_row(stage, f"{seconds:.2f}")
    return table
