"""`graphopt passes`."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from graphopt.cli.terminal import console
from graphopt.passes.registry import all_passes, default_passes, ordered, origin


def command() -> None:
    """List every pass in the order it runs.

    order: the numbers of the passes that it declares to be after or before. runs: by default, or if
    asked for with enable=. from: graphopt, or the distribution of a plugin.
    """
    # Without lines between the columns it fits into 80 of them.
    table = Table(box=None, padding=(0, 1, 0, 0))
    for heading in ("", "pass", "stage", "tier", "order", "runs", "from"):
        table.add_column(heading, no_wrap=heading != "order")
    default = set(default_passes())
    classes = ordered(all_passes())
    numbers = {cls.name: number for number, cls in enumerate(classes, start=1)}
    for cls in classes:
        declared = {"after": (*cls.after, *cls.requires), "before": cls.before}
        order = [
            " ".join([relation, *map(str, sorted({numbers[name] for name in names}))])
            for relation, names in declared.items()
            if names
        ]
        runs = "default" if cls.name in default else "if asked"
        row = [str(numbers[cls.name]), cls.name, cls.stage, cls.tier.kind]
        table.add_row(*(Text(cell) for cell in [*row, "\n".join(order), runs, origin(cls)]))
    console.print(table)
