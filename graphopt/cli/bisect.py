"""`graphopt bisect`."""

from __future__ import annotations

import runpy
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from graphopt.check.bisect import bisect
from graphopt.cli.options import Disable, Enable, Limit, limits_in
from graphopt.cli.terminal import console
from graphopt.errors import UnsupportedError
from graphopt.models import load
from graphopt.program.save import is_program
from graphopt.record.dump import is_dump


def command(
    target: Annotated[
        str,
        typer.Argument(
            help="a model, or a .py file that defines `model` and maybe `example`, `is_good` and "
            "passes of its own"
        ),
    ],
    disable: Disable = None,
    enable: Enable = None,
    limit: Limit = None,
    out: Annotated[
        Path | None,
        typer.Option(help="folder for a reproducer that runs alone", show_default=False),
    ] = None,
) -> None:
    """Find the first rewrite that makes the model compute something else."""
    known: dict[str, Any] = {"model": target}
    if target.endswith(".py"):
        if not Path(target).is_file():
            raise UnsupportedError(f"{target} is no file")
        known = _script(Path(target))
        if "model" not in known:
            raise UnsupportedError(f"{target} defines no `model`")
    elif is_program(Path(target)) or is_dump(Path(target)):
        raise UnsupportedError(
            f"{target} is compiled already; bisect the model that it was compiled from"
        )
    else:
        known["model"] = load(target, weights="dense")
    found = bisect(
        known["model"],
        known.get("example"),
        is_good=known.get("is_good"),
        disable=disable or (),
        enable=enable or (),
        limits=limits_in(limit),
    )
    if found is None:
        console.print(Text("no rewrite changes what the model computes"))
        return
    console.print(Text(str(found)), soft_wrap=True)
    if out is not None:
        found.save(out)
        console.print(Text(f"reproducer: python {out / 'reproduce.py'}"), soft_wrap=True)
    raise typer.Exit(1)


def _script(path: Path) -> dict[str, Any]:
    """What a script defines, run as `python script.py` would, imports from its folder included."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        return runpy.run_path(str(path))
    except SystemExit as error:
        raise UnsupportedError(f"{path} ends the process ({error.code!r}) before the end") from None
    except SyntaxError as error:
        raise UnsupportedError(f"{path} is no Python: {error}") from error
    # A script may raise anything.
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        place = f" at line {lines[-1]}" if lines else ""
        raise UnsupportedError(f"{path} raised {type(error).__name__}{place}: {error}") from error
    finally:
        sys.path.remove(folder)
