"""`graphopt run`."""

from __future__ import annotations

from typing import Annotated

import typer

from graphopt.cli.completion import stream, valid
from graphopt.cli.editor import edit_with
from graphopt.cli.opening import open_program
from graphopt.cli.options import Model, ModelOptions, PassOptions, takes_options
from graphopt.cli.terminal import console
from graphopt.errors import UnsupportedError


@takes_options
def command(
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
    *,
    passes: PassOptions,
    kind: ModelOptions,
) -> None:
    """Compile a model with other passes, or with the graph edited by hand, and generate with it."""
    prompt = valid(prompt)
    if editor is not None and not edit_after:
        raise UnsupportedError("--editor has no effect without --edit-after")
    options = passes.given()
    if edit_after:
        options["edit"] = dict.fromkeys(edit_after, edit_with(editor, console))
    program = open_program(model, kind, spins=not edit_after, **options)
    stream(program, program.chat_prompt(prompt) if chat else prompt, max_tokens=max_tokens)
