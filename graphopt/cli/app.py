"""The command line: `graphopt demo | generate | run | compile | dump | inspect | explain |
explore | bisect | passes`.

Errors that graphopt raises on purpose are printed as one line, exit status 2; output that cannot be
written (a full disk) likewise, exit status 1; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import runpy
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import typer
from rich.console import Console, ConsoleDimensions
from rich.markup import escape
from rich.table import Table
from rich.text import Text

import graphopt
from graphopt.cli.explore import explore_command
from graphopt.cli.options import (
    Activations,
    Backend,
    Check,
    Disable,
    Dtype,
    Enable,
    Limit,
    Model,
    Weights,
    edit_with,
    limits_in,
    pipeline_options,
)
from graphopt.errors import GraphoptError, UnsupportedError
from graphopt.models import BUILTINS, load
from graphopt.passes.registry import all_passes, default_passes, ordered, origin
from graphopt.program.program import Program
from graphopt.program.save import is_program, load_program, load_report
from graphopt.record.dump import Dump, is_dump, read_dump
from graphopt.record.report import grouped
from graphopt.runtime.request import sampling_params

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compile transformer models into graphs that can be seen, checked and run.",
)


class _Terminal(Console):
    """A terminal that says it has no columns (COLUMNS=0) gets 80, rather than nothing."""

    @property
    def size(self) -> ConsoleDimensions:
        found = super().size
        return found if found.width > 0 else ConsoleDimensions(80, found.height)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size


console = _Terminal()
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)

DEMO_MODEL = "smollm2-135m"
DEMO_PROMPT = "What is a compiler? Answer briefly."
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def open_program(
    model: str,
    *,
    weights: str | None = None,
    dtype: str | None = None,
    activations: str | None = None,
    backend: str | None = None,
    spins: bool = True,
    **options: Any,
) -> Program:
    """Load a saved program, or load and compile a model, with a spinner.

    options: of `graphopt.compile`. spins: False leaves the terminal to somebody else.

    Raises UnsupportedError for values that do not exist, and for options that a saved program
    cannot follow any more.
    """
    if is_dump(Path(model)):
        raise UnsupportedError(
            f"{model} is a dump, which has no weights; graphopt explain and explore read it"
        )
    if is_program(Path(model)):
        refuse_options(model, weights=weights, dtype=dtype, activations=activations, **options)
        with console.status(Text(f"loading {model}")):
            return load_program(model, backend=backend)
    if dtype is not None and dtype not in DTYPES:
        raise UnsupportedError(f"--dtype {dtype!r} is not supported; supported: {list(DTYPES)}")
    # Not inside a spinner: fetching weights shows its own progress.
    start = time.perf_counter()
    source = load(model, dtype=DTYPES[dtype or "float32"], weights=_kept(model, weights))
    loaded = time.perf_counter() - start
    status = console.status(Text(f"compiling {source.name}")) if spins else nullcontext()
    with status:
        program = graphopt.compile(
            source,
            backend=backend or "cpu",
            activations=activations or "float",  # type: ignore[arg-type]
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


def _valid(prompt: str) -> str:
    """The prompt. Raises UnsupportedError when the shell handed over bytes that are no UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UnsupportedError(
            f"the prompt is not valid UTF-8 at character {error.start}; write it in UTF-8"
        ) from None
    return prompt


def _fitting(program: Program, prompt: str | list[int]) -> int:
    """As many tokens as the context leaves after the prompt, at most those of the model's default
    settings."""
    limit, most = program.executable.max_context, program.options.default_sampling.max_tokens
    has_length = not isinstance(prompt, str) or program.tokenizer is not None
    if limit is None or not has_length:
        return most
    tokens = program.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    return max(1, min(most, limit - len(tokens) + 1))


def stream(program: Program, prompt: str | list[int], **sampling: Any) -> None:
    """Print a completion as it is made, then its speed. sampling: as of `Program.stream`; what is
    not given is the model's own default."""
    start = time.perf_counter()
    first, count = 0.0, 0
    for event in program.stream(prompt, **sampling):
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
    program = open_program(DEMO_MODEL, activations="int8")
    console.print(Text(prompt, style="bold"))
    stream(program, program.chat_prompt(prompt), max_tokens=max_tokens)
    console.print(program.report.table())
    console.print(times_table(program))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="text to continue, or a question with --chat")],
    chat: Annotated[bool, typer.Option(help="wrap the prompt in the chat template")] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="tokens to generate; default: the model's own (128), or what the context leaves",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 is greedy; default: the model's own", show_default=False),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="0 is off; default: the model's own", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="1 is off; default: the model's own", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="makes sampling repeatable")] = None,
    weights: Weights = None,
    dtype: Dtype = None,
    activations: Activations = None,
    backend: Backend = None,
) -> None:
    """Generate text with a model or a saved program."""
    sampling: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    sampling = {name: value for name, value in sampling.items() if value is not None}
    # Before a model is loaded for nothing.
    sampling_params(None, sampling)
    prompt = _valid(prompt)
    program = open_program(
        model, weights=weights, dtype=dtype, activations=activations, backend=backend
    )
    asked = program.chat_prompt(prompt) if chat else prompt
    if max_tokens is None:
        sampling["max_tokens"] = _fitting(program, asked)
    stream(program, asked, **sampling)


@app.command()
def run(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="text to continue, or a question with --chat")],
    edit_after: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PASS",
            help="open the graph text after this pass in an editor, verify it, go on with it",
            show_default=False,
        ),
    ] = None,
    editor: Annotated[
        str | None,
        typer.Option(help="command to edit with; default: $VISUAL or $EDITOR", show_default=False),
    ] = None,
    chat: Annotated[bool, typer.Option(help="wrap the prompt in the chat template")] = False,
    max_tokens: Annotated[int, typer.Option(help="tokens to generate")] = 32,
    disable: Disable = None,
    enable: Enable = None,
    limit: Limit = None,
    check: Check = None,
    weights: Weights = None,
    dtype: Dtype = None,
    activations: Activations = None,
    backend: Backend = None,
) -> None:
    """Compile a model with other passes, or with the graph edited by hand, and generate with it."""
    prompt = _valid(prompt)
    if editor is not None and not edit_after:
        raise UnsupportedError("--editor has no effect without --edit-after")
    options = pipeline_options(disable, enable, limit, check)
    if edit_after:
        options["edit"] = dict.fromkeys(edit_after, edit_with(editor, console))
    program = open_program(
        model,
        weights=weights,
        dtype=dtype,
        activations=activations,
        backend=backend,
        spins=not edit_after,
        **options,
    )
    stream(program, program.chat_prompt(prompt) if chat else prompt, max_tokens=max_tokens)


@app.command("compile")
def compile_(
    model: Model,
    out: Annotated[Path, typer.Argument(help="folder for the program, new or empty")],
    dump: Annotated[
        Path | None, typer.Option(help="folder to dump to, too", show_default=False)
    ] = None,
    disable: Disable = None,
    enable: Enable = None,
    limit: Limit = None,
    check: Check = None,
    weights: Weights = None,
    dtype: Dtype = None,
    activations: Activations = None,
    backend: Backend = None,
) -> None:
    """Compile a model and save the program."""
    options = pipeline_options(disable, enable, limit, check)
    if dump is not None:
        options["dump"] = dump
    program = open_program(
        model, weights=weights, dtype=dtype, activations=activations, backend=backend, **options
    )
    program.save(out)
    console.print(program.report.table())
    console.print(times_table(program))
    console.print(Text(f"saved to {out}"), soft_wrap=True)


@app.command("dump")
def dump_(
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
    disable: Disable = None,
    enable: Enable = None,
    limit: Limit = None,
    check: Check = None,
    weights: Weights = None,
    dtype: Dtype = None,
    activations: Activations = None,
    backend: Backend = None,
) -> None:
    """Write the graph after each pass, what the pass changed, and a summary.

    A saved program shows what happened when it was compiled; a model is compiled.
    """
    dump = Dump(out, tuple(pass_ or ()), tuple(layer or ()), tuple(op or ()))
    options = pipeline_options(disable, enable, limit, check)
    kinds: dict[str, Any] = {"weights": weights, "dtype": dtype, "activations": activations}
    if is_program(Path(model)):
        open_program(model, backend=backend, **kinds, **options).dump(dump)
    else:
        open_program(model, backend=backend, **kinds, **options, dump=dump)
    console.out((out / "summary.txt").read_text(), highlight=False)


@app.command()
def inspect(
    model: Model,
    serving: Annotated[bool, typer.Option(help="the graph with the KV cache")] = False,
    text: Annotated[bool, typer.Option(help="print the whole graph text")] = False,
    weights: Weights = None,
    dtype: Dtype = None,
) -> None:
    """Show what is in a model's or program's graph: op counts, reasons, or the whole text."""
    from graphopt.ir.text.printer import print_graph

    program = open_program(model, weights=weights, dtype=dtype, backend="reference")
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


@app.command()
def explain(
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
        report = open_program(model, weights=weights, dtype=dtype, backend="reference").report
    found = graphopt.explain(report, *(pass_ or ()))
    if json:
        console.out(found.to_json(), highlight=False)
        return
    for run in found.runs:
        is_brief = not pass_ and run.stage == "cleanup" and run.is_complete
        if is_brief or not run.rows:
            console.print(Text(f"{found.title(run)}: {run.summary}"))
        else:
            console.print(found.run_table(run))


app.command("explore")(explore_command)


@app.command()
def bisect(
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
    found = graphopt.bisect(
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


@app.command()
def passes() -> None:
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


def main() -> None:
    """Entry point of the `graphopt` command."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except GraphoptError as error:
        _complain(str(error))
        sys.exit(2)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        # What is still buffered would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _complain(f"the output could not be written: {error}")
        sys.exit(1)


def _complain(message: str) -> None:
    text = Text.assemble(("error:", "red"), " ", message)
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
