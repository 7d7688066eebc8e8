"""The command line: `graphopt demo | generate | compile | inspect | passes`.

Errors that graphopt raises on purpose are printed as one line, exit status 2; anything else is a
bug and keeps its traceback.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

import graphopt
from graphopt.errors import GraphoptError
from graphopt.models import BUILTINS, load
from graphopt.passes.registry import all_passes, ordered
from graphopt.program import Program
from graphopt.report import grouped
from graphopt.runtime import SamplingParams
from graphopt.storage import is_program, load_program

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compile transformer models into graphs that can be seen, checked and run.",
)
console = Console()

Model = Annotated[str, typer.Argument(help="model name, folder, .gguf file, or saved program")]
Weights = Annotated[
    str, typer.Option(help="packed: keep the low-bit weights of a GGUF file; dense: expand them")
]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16")]
Activations = Annotated[str, typer.Option(help="float, or int8 for faster low-bit layers")]
Backend = Annotated[str, typer.Option(help="cpu or reference")]
DEMO_MODEL = "smollm2-135m"
DEMO_PROMPT = "What is a compiler? Answer briefly."
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def open_program(
    model: str, weights: str, dtype: str, activations: str, backend: str, dump: Path | None = None
) -> Program:
    """Load a saved program, or load and compile a model, with a spinner."""
    with console.status(f"loading {model}"):
        if is_program(Path(model)):
            return load_program(model)
    if dtype not in DTYPES:
        raise graphopt.errors.UnsupportedError(
            f"--dtype {dtype!r} is not supported; supported: {', '.join(DTYPES)}"
        )
    if weights not in ("packed", "dense"):
        raise graphopt.errors.UnsupportedError(
            f"--weights {weights!r} is not supported; supported: packed, dense"
        )
    # Not inside a spinner: fetching weights shows its own progress.
    start = time.perf_counter()
    source = load(model, dtype=DTYPES[dtype], weights=_kept(model, weights))
    loaded = time.perf_counter() - start
    with console.status(f"compiling {source.name}"):
        program = graphopt.compile(
            source,
            backend=backend,
            activations=activations,  # type: ignore[arg-type]
            dump=dump,
        )
    program.report.seconds["load"] = loaded
    return program


def _kept(model: str, weights: str) -> Literal["packed", "dense"]:
    """Only GGUF files have low-bit weights to keep; folders and hub names are dense."""
    is_gguf = model in BUILTINS or model.endswith(".gguf")
    return "packed" if weights == "packed" and is_gguf else "dense"


def stream(program: Program, prompt: str | list[int], params: SamplingParams) -> None:
    """Print a completion as it is made, then its speed."""
    start = time.perf_counter()
    first, count = 0.0, 0
    for event in program.stream(prompt, params):
        count += event.token is not None
        first = first or time.perf_counter() - start
        console.out(event.text or "", end="", highlight=False)
    total = time.perf_counter() - start
    speed = (count - 1) / (total - first) if count > 1 else 0.0
    console.print(
        f"\n[dim]{count} tokens, first after {first * 1e3:.0f} ms, then {speed:.0f} tokens/s[/dim]"
    )


def times_table(program: Program) -> Table:
    """Seconds of each stage of a compilation."""
    table = Table(title="compilation")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for stage, seconds in program.report.seconds.items():
        table.add_row(stage, f"{seconds:.2f}")
    return table


@app.command()
def demo(
    prompt: Annotated[
        str, typer.Option(help="what to ask")
    ] = "What is a compiler? Answer briefly.",
    max_tokens: Annotated[int, typer.Option(help="tokens to generate")] = 64,
) -> None:
    """Fetch the built-in model (93 MB, once), compile it, and stream an answer."""
    program = open_program(DEMO_MODEL, "packed", "float32", "int8", "cpu")
    console.print(f"[bold]{prompt}[/bold]")
    stream(program, program.chat_prompt(prompt), SamplingParams(max_tokens=max_tokens))
    console.print(program.report.table())
    console.print(times_table(program))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="text to continue, or a question with --chat")],
    chat: Annotated[bool, typer.Option(help="wrap the prompt in the chat template")] = False,
    max_tokens: Annotated[int, typer.Option(help="tokens to generate")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 is off")] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="makes sampling repeatable")] = None,
    weights: Weights = "packed",
    dtype: Dtype = "float32",
    activations: Activations = "float",
    backend: Backend = "cpu",
) -> None:
    """Generate text with a model or a saved program."""
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    program = open_program(model, weights, dtype, activations, backend)
    stream(program, program.chat_prompt(prompt) if chat else prompt, params)


@app.command("compile")
def compile_(
    model: Model,
    out: Annotated[Path, typer.Argument(help="folder for the program, new or empty")],
    dump: Annotated[Path | None, typer.Option(help="folder for the graph after each pass")] = None,
    weights: Weights = "packed",
    dtype: Dtype = "float32",
    activations: Activations = "float",
    backend: Backend = "cpu",
) -> None:
    """Compile a model and save the program."""
    program = open_program(model, weights, dtype, activations, backend, dump)
    program.save(out)
    console.print(program.report.table())
    console.print(times_table(program))
    console.print(f"saved to {out}")


@app.command()
def inspect(
    model: Model,
    serving: Annotated[bool, typer.Option(help="the graph with the KV cache")] = False,
    text: Annotated[bool, typer.Option(help="print the whole graph text")] = False,
    weights: Weights = "packed",
    dtype: Dtype = "float32",
) -> None:
    """Show what is in a model's or program's graph: op counts, reasons, or the whole text."""
    from graphopt.ir.printer import print_graph

    program = open_program(model, weights, dtype, "float", "reference")
    graph = program.serving if serving else program.graph
    if graph is None:
        _ = program.executable
        return
    if text:
        console.out(print_graph(graph), highlight=False)
        return
    table = Table(title=f"{graph.name} ({graph.dialect}), {graph.num_calls()} ops")
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
            reasons.add_row(record.name, reason, str(count))
    console.print(reasons)


@app.command()
def passes() -> None:
    """List every pass in the order it runs, with its stage and tier."""
    table = Table(title="passes")
    for heading in ("pass", "stage", "tier", "after"):
        table.add_column(heading)
    for cls in ordered(all_passes()):
        table.add_row(cls.name, cls.stage, cls.tier.kind, ", ".join(cls.after))
    console.print(table)


def main() -> None:
    """Entry point of the `graphopt` command."""
    try:
        app()
    except GraphoptError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, markup=True)
        sys.exit(2)
