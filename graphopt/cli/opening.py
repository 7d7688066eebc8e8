"""From what a command was given to a program: loaded as it was saved, or compiled."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.text import Text

from graphopt.cli.options import ModelOptions
from graphopt.cli.terminal import console
from graphopt.errors import UnsupportedError
from graphopt.models import BUILTINS, load
from graphopt.program.compile import Activations, compile
from graphopt.program.program import Program
from graphopt.program.save import is_program, load_program
from graphopt.record.dump import is_dump

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def open_program(model: str, kind: ModelOptions, *, spins: bool = True, **options: Any) -> Program:
    """Load a saved program, or load and compile a model, with a spinner.

    kind: how to load and run it. options: of `graphopt.compile`. spins: False leaves the terminal
    to somebody else.

    Raises UnsupportedError for values that do not exist, and for options that a saved program
    cannot follow any more.
    """
    if is_dump(Path(model)):
        raise UnsupportedError(
            f"{model} is a dump, which has no weights; graphopt explain and explore read it"
        )
    if is_program(Path(model)):
        refuse_options(model, **kind.of_compilation(), **options)
        with console.status(Text(f"loading {model}")):
            return load_program(model, backend=kind.backend)
    if kind.dtype is not None and kind.dtype not in DTYPES:
        raise UnsupportedError(
            f"--dtype {kind.dtype!r} is not supported; supported: {list(DTYPES)}"
        )
    # Not inside a spinner: fetching weights shows its own progress.
    start = time.perf_counter()
    source = load(model, dtype=DTYPES[kind.dtype or "float32"], weights=_kept(model, kind.weights))
    loaded = time.perf_counter() - start
    status = console.status(Text(f"compiling {source.name}")) if spins else nullcontext()
    with status:
        program = compile(
            source,
            backend=kind.backend or "cpu",
            activations=cast(Activations, kind.activations or "float"),
            **options,
        )
    program.report.seconds["load"] = loaded
    return program


def refuse_options(model: str, **options: object) -> None:
    """Raise UnsupportedError when an option is given that is decided at compile time."""
    for name, value in options.items():
        if value is not None:
            option = {"limits": "limit", "edit": "edit-after"}.get(name, name)
            raise UnsupportedError(
                f"--{option} has no effect on {model}, which is compiled already; leave it out, or "
                "give the model that the program was compiled from"
            )


def _kept(model: str, weights: str | None) -> Literal["packed", "dense"]:
    """Only GGUF files have low-bit weights to keep; folders and hub names are dense."""
    if weights is None:
        is_gguf = model in BUILTINS or model.endswith(".gguf")
        return "packed" if is_gguf else "dense"
    return cast(Literal["packed", "dense"], weights)
