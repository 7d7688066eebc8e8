"""What a user asks for, and how far it has come. Data and legal transitions only."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any, Literal

from graphopt.errors import RequestError, did_you_mean

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens, per request.

    max_tokens: at most this many new tokens (>= 1).
    temperature: 0 is greedy; otherwise logits are divided by it. Then, in this order:
    top_k: keep the k most likely tokens (0: all). top_p: keep the smallest set of tokens whose
        probability reaches p, in (0, 1]. min_p: drop tokens below min_p times the most likely
        one's probability, in [0, 1].
    Before all that, also when greedy, and as transformers defines them:
    repetition_penalty: logits of tokens of the prompt and the output are divided by it where they
        are positive and multiplied where they are negative (1: off).
    no_repeat_ngram_size: no n-gram of this size twice in prompt and output (0: off).
    bad_words_ids: sequences of tokens that are not written.
    min_tokens: no end token before this many new tokens; max_tokens ends it all the same.
    suppress_tokens: tokens that are never chosen; begin_suppress_tokens: not as the first one.
    seed: same seed, same prompt, same tokens, whatever else runs; None: drawn by the engine.
    stop: texts that end generation (not part of the result; needs a tokenizer).
    stop_token_ids: tokens that end it, beside the model's own end tokens.
    ignore_eos: the model's own end tokens do not end it.

    Raises RequestError naming the field, the value and the legal range.
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
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check every type and range."""
        self._check("max_tokens", _is_int(self.max_tokens, 1), "an integer >= 1")
        self._check(
            "temperature",
            _is_number(self.temperature) and 0.0 <= self.temperature <= sys.float_info.max,
            "finite and >= 0 (0 is greedy)",
        )
        self._check("top_k", _is_int(self.top_k, 0), "an integer >= 0 (0 is off)")
        self._check(
            "top_p", _is_number(self.top_p) and 0.0 < self.top_p <= 1.0, "in (0, 1] (1 is off)"
        )
        self._check(
            "min_p", _is_number(self.min_p) and 0.0 <= self.min_p <= 1.0, "in [0, 1] (0 is off)"
        )
        self._check(
            "seed",
            self.seed is None or (_is_int(self.seed, 0) and self.seed < 2**63),
            "None or an integer in [0, 2^63)",
        )
        self._check(
            "stop",
            isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop),
            "a tuple of non-empty strings",
        )
        for name in ("stop_token_ids", "suppress_tokens", "begin_suppress_tokens"):
            self._check(name, _is_ids(getattr(self, name)), "a tuple of token ids >= 0")
        self._check("ignore_eos", isinstance(self.ignore_eos, bool), "True or False")
        self._check(
            "repetition_penalty",
            _is_number(self.repetition_penalty)
            and 0.0 < self.repetition_penalty <= sys.float_info.max,
            "finite and > 0 (1 is off)",
        )
        self._check(
            "no_repeat_ngram_size",
            _is_int(self.no_repeat_ngram_size, 0),
            "an integer >= 0 (0 is off)",
        )
        self._check(
            "bad_words_ids",
            isinstance(self.bad_words_ids, tuple)
            and all(_is_ids(word) and word for word in self.bad_words_ids),
            "a tuple of non-empty tuples of token ids >= 0",
        )
        self._check("min_tokens", _is_int(self.min_tokens, 0), "an integer >= 0 (0 is off)")

    @property
    def has_processors(self) -> bool:
        """True when the logits are changed before a token is chosen."""
        return (
            self.repetition_penalty != 1.0
            or self.no_repeat_ngram_size > 0
            or self.min_tokens > 0
            or bool(self.bad_words_ids or self.suppress_tokens or self.begin_suppress_tokens)
        )

    def token_ids(self) -> Iterator[tuple[str, int]]:
        """(field, token id) of every id that the settings name."""
        for name in ("stop_token_ids", "suppress_tokens", "begin_suppress_tokens"):
            yield from ((name, token) for token in getattr(self, name))
        yield from (("bad_words_ids", token) for word in self.bad_words_ids for token in word)

    def _check(self, name: str, is_legal: bool, legal: str) -> None:
        if not is_legal:
            raise RequestError(f"{name}={getattr(self, name)!r} is not allowed; it must be {legal}")


def sampling_params(
    params: Any, settings: Mapping[str, Any], defaults: SamplingParams | None = None
) -> Any:
    """`params`, or one made of its fields, as `generate(prompt, max_tokens=3)` gives them; fields
    that are not given are those of `defaults`.

    Raises RequestError for both at once, and for a field that does not exist.
    """
    if not settings:
        return params
    if params is not None:
        raise RequestError("give params or its fields, not both")
    known = [field.name for field in fields(SamplingParams)]
    for name in settings:
        if name not in known:
            raise RequestError(
                f"no sampling setting is called {name!r}; there are {', '.join(known)}"
                + did_you_mean(name, known)
            )
    return replace(SamplingParams() if defaults is None else defaults, **settings)


def sampling_from_plain(settings: Mapping[str, Any]) -> SamplingParams:
    """From plain values, as JSON has them: a list stands for a tuple.

    Raises RequestError as SamplingParams does, and for a field that does not exist.
    """
    plain = {name: _as_tuple(value) for name, value in settings.items()}
    return sampling_params(None, plain) or SamplingParams()


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int; numpy's integers are welcome.

    Raises RequestError for anything else, and for numbers below `least`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise RequestError(f"{name}={value!r} is not allowed; it must be an integer >= {least}")
    return number


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_ids(value: Any) -> bool:
    return isinstance(value, tuple) and all(_is_int(token, 0) for token in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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

    seed: of its randomness, `params.seed` or one the engine drew. end_tokens: tokens that end it.
    computed: how many of prompt + output tokens have their keys and values in the cache. There is
    no prefill or decode phase: `computed` catches up with `length`, then a token is sampled.
    blocks: the cache blocks it holds, in order of position; owned by the scheduler.
    """

    request_id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int = 0
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
                f"request {self.request_id} cannot go from {self.status.value} to {status.value}"
            )
        self.status = status

    def append(self, token: int) -> FinishReason | None:
        """Add a sampled token; returns why it was the last one, None when it was not."""
        self.output.append(token)
        if token in self.end_tokens:
            return "stop"
        return "length" if len(self.output) >= self.params.max_tokens else None


def token_tuple(tokens: Any) -> tuple[int, ...]:
    """Token ids as plain ints; one-dimensional numpy arrays and torch tensors are welcome.

    Raises RequestError for anything that is not a sequence of integers.
    """
    plain = _plain(tokens)
    if isinstance(plain, Sequence) and not isinstance(plain, str | bytes):
        ids = [_plain(token) for token in plain]
        try:
            if not any(isinstance(token, bool) for token in ids):
                return tuple(map(operator.index, ids))
        except TypeError:
            pass
    shape = getattr(tokens, "shape", None)
    found = type(tokens).__name__ if shape is None else f"{tokens.dtype} {list(shape)}"
    raise RequestError(
        "a prompt is a string or a sequence of integer token ids (a list, or a tensor or array of "
        f"one dimension), not {found}"
    )


def _plain(value: Any) -> Any:
    """numpy's and torch's values as Python's: an axis becomes a list."""
    return value.tolist() if hasattr(value, "tolist") else value
