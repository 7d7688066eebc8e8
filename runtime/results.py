"""What an engine gives its caller: events, completions, counters."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.runtime.request import FinishReason


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Something that happened to a request in a step.

    token: the new token, None when the request ended without one (cancelled).
    text: the text that became certain ("" while characters or stop texts are incomplete), None
    without a tokenizer. finish_reason: set on the request's last event, and only there.
    """

    request_id: int
    token: int | None
    text: str | None
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request. text is None without a tokenizer; seed repeats it."""

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    seed: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the engine was made (steps .. preemptions), and its present state."""

    steps: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    running: int
    waiting: int
    blocks_used: int
    blocks_free: int
