"""What a request's settings do to its logits before a token is chosen.

The definitions are those of `transformers.generation.logits_process`, applied in the order of its
`generate`: repetition_penalty, no_repeat_ngram_size, bad_words_ids, min_tokens, suppress_tokens,
begin_suppress_tokens. All depend on nothing but the row's logits and the request's own tokens, so
batching, chunked prompts and preemption cannot change them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.runtime.request import SamplingParams

_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class History:
    """The tokens of a request before the one to choose: the first `prompt_length` of them are its
    prompt. end_tokens: tokens that would end it."""

    tokens: Sequence[int]
    prompt_length: int
    end_tokens: frozenset[int] = frozenset()


def process(logits_V: Tensor, params: SamplingParams, history: History) -> Tensor:
    """A changed copy of `logits_V` (float32 or wider `[V]`); -inf rules a token out."""
    logits_V = logits_V.clone()
    tokens, new_tokens = history.tokens, len(history.tokens) - history.prompt_length
    if params.repetition_penalty != 1.0:
        _penalize(logits_V, tokens, params.repetition_penalty)
    banned: set[int] = set()
    if params.no_repeat_ngram_size:
        banned |= _ngram_ends(tokens, params.no_repeat_ngram_size)
    if params.bad_words_ids:
        banned |= _bad_word_ends(tokens, params.bad_words_ids, history.end_tokens)
    if new_tokens < params.min_tokens:
        banned |= history.end_tokens
    banned |= set(params.suppress_tokens)
    if new_tokens == 0:
        banned |= set(params.begin_suppress_tokens)
    if banned:
        logits_V[list(banned)] = _NEVER
    return logits_V


def _penalize(logits_V: Tensor, tokens: Iterable[int], penalty: float) -> None:
    seen = torch.tensor(sorted(set(tokens)), device="cpu")
    chosen = logits_V[seen]
    logits_V[seen] = torch.where(chosen < 0, chosen * penalty, chosen / penalty)


def _ngram_ends(tokens: Sequence[int], size: int) -> set[int]:
    """Tokens that would complete an n-gram that is already there."""
    start = [*tokens[len(tokens) - size + 1 :]] if size > 1 else []
    return {
        tokens[place + size - 1]
        for place in range(len(tokens) - size + 1)
        if [*tokens[place : place + size - 1]] == start
    }


def _bad_word_ends(
    tokens: Sequence[int], words: Iterable[tuple[int, ...]], end_tokens: frozenset[int]
) -> set[int]:
    """Last tokens of the words whose other tokens have just been written. An end token that stands
    alone is no bad word."""
    found: set[int] = set()
    for *start, last in words:
        alone = not start and last not in end_tokens
        written = bool(start) and [*tokens[-len(start) :]] == start
        if alone or written:
            found.add(last)
    return found
