"""Printing a completion as it is made, and checking what was asked."""

from __future__ import annotations

import time
from typing import Any

from graphopt.cli.terminal import console
from graphopt.errors import UnsupportedError
from graphopt.program.program import Program


def valid(prompt: str) -> str:
    """The prompt. Raises UnsupportedError when the shell handed over bytes that are no UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UnsupportedError(
            f"the prompt is not valid UTF-8 at character {error.start}; write it in UTF-8"
        ) from None
    return prompt


def fitting(program: Program, prompt: str | list[int]) -> int:
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
