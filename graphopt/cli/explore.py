"""`graphopt explore`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from graphopt.inspect.explorer import explore


def command(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="DIR|MODEL", help="saved program, dump folder, model name, folder or .gguf file"
        ),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="the page to write", dir_okay=True)
    ] = Path("explore.html"),
    batch: Annotated[int, typer.Option(help="sequences that costs are computed for")] = 1,
    sequence: Annotated[int, typer.Option(help="tokens of each")] = 512,
    force: Annotated[bool, typer.Option("--force", help="replace another file")] = False,
) -> None:
    """Write one HTML file that shows what every pass did: diffs, drawings, reasons, costs."""
    page = explore(subject, out, batch=batch, sequence=sequence, force=force)
    size = page.stat().st_size / 1e6
    Console().print(Text(f"wrote {page} ({size:.1f} MB); open it in a browser"))
