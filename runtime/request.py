"""What a user asks for, and how far it has come. Data and legal transitions only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from graphopt.errors import RequestError

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens, per request.

    max_tokens: at most this many new tokens (>= 1).
    temperature: 0 is greedy; otherwise logits are divided by it.
    top_k: keep the k most likely tokens (0: all). top_p: keep the smallest set of tokens whose
        probability reaches p, in (0, 1]. min_p: drop tokens below min_p times the most likely
        one's probability, in [0, 1].
    seed: same seed, same prompt, same tokens, whatever else runs; None: drawn by the engine.
    stop: texts that end generation (not part of the result; needs a tokenizer).
    stop_token_ids: tokens that end it, beside the model's own end tokens. ignore_eos: only ours.

    Raises RequestError naming the field and the legal range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Check every range."""
        self._check("max_tokens", self.max_tokens >= 1, "at least 1")
        self._check("temperature", 0.0 <= self.temperature < float("inf"), "finite and >= 0")
        self._check("top_k", self.top_k >= 0, ">= 0 (0 is off)")
        self._check("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]")
        self._check("min_p", 0.0 <= self.min_p <= 1.0, "in [0, 1]")
        self._check("seed", self.seed is None or 0 <= self.seed < 2**63, "None or in [0, 2^63)")
        is_texts = not isinstance(self.stop, str) and all(
            isinstance(text, str) and text for text in self.stop
        )
        self._check("stop", is_texts, "a tuple of non-empty strings")

    def _check(self, name: str, is_legal: bool, legal: str) -> None:
        if not is_legal:
            raise RequestError(f"{name}={getattr(self, name)!r} is not allowed; it must be {legal}")


class Status(Enum):
    """WAITING -> RUNNING -> FINISHED; RUNNING -> WAITING when preempted."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


_LEGAL = {
    (Status.WAITING, Status.RUNNING),
    (Status.RUNNING, Status.WAITING),
    (Status.RUNNING, Status.FINISHED),
    (Status.WAITING, Status.FINISHED),
}


@dataclass(slots=True, eq=False)
class Request:
    """One generation.

    computed: how many of prompt + output tokens have their keys and values in the cache. There is
    no prefill or decode phase: `computed` catches up with `length`, then a token is sampled.
    """

    request_id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    end_tokens: frozenset[int] = frozenset()
    output: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    preemptions: int = 0

    @property
    def length(self) -> int:
        """Tokens so far, prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return self.length - self.computed

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Tokens `start..stop` of prompt + output."""
        prompt_length = len(self.prompt)
        if start >= prompt_length:
            return tuple(self.output[start - prompt_length : stop - prompt_length])
        return (*self.prompt[start:stop], *self.output[: max(0, stop - prompt_length)])

    def move(self, status: Status) -> None:
        """Change status; an illegal transition is a bug and raises RuntimeError."""
        if (self.status, status) not in _LEGAL:
            raise RuntimeError(
                f"request {self.request_id} cannot go from {self.status} to {status}"
            )
        self.status = status

    def append(self, token: int) -> None:
        """Add a sampled token and decide whether it was the last."""
        self.output.append(token)
        if token in self.end_tokens:
            self.finish_reason = "stop"
        elif len(self.output) >= self.params.max_tokens:
            self.finish_reason = "length"


def token_tuple(tokens: Sequence[int]) -> tuple[int, ...]:
    """Token ids as a tuple of ints. Raises RequestError for anything else."""
    ids = tuple(tokens)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise RequestError("a prompt is a string or a sequence of integer token ids")
    return ids
