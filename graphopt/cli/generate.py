"""`graphopt generate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from graphopt.cli.completion import fitting, stream, valid
from graphopt.cli.opening import open_program
from graphopt.cli.options import Model, ModelOptions, takes_options
from graphopt.runtime.request import sampling_params


@takes_options
def command(
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
    *,
    kind: ModelOptions,
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
    prompt = valid(prompt)
    program = open_program(model, kind)
    asked = program.chat_prompt(prompt) if chat else prompt
    if max_tokens is None:
        sampling["max_tokens"] = fitting(program, asked)
    stream(program, asked, **sampling)
