"""The engine: submit requests, step, get tokens. Continuous batching over one executable."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.codegen.backend import ServingExecutable
from graphopt.runtime.blocks import BlockPool
from graphopt.runtime.detokenizer import Detokenizer
from graphopt.runtime.request import FinishReason, Request, SamplingParams, token_tuple
from graphopt.runtime.runner import Runner
from graphopt.runtime.sampler import SamplingRow, sample
from graphopt.runtime.scheduler import Scheduler, StepPlan

from graphopt.errors import RequestError

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Something that happened to a request in a step.

    token: the new token, None when the request ended without one (cancelled).
    text: the text that became certain ("" while characters or stop texts are incomplete), None
    without a tokenizer. finish_reason: set on the request's last event.
    """

    request_id: int
    token: int | None
    text: str | None
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request. text is None without a tokenizer."""

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    seed: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the engine was made, and its present state."""

    steps: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    running: int
    waiting: int
    blocks_used: int
    blocks_free: int


@dataclass(slots=True, eq=False)
class _Live:
    request: Request
    seed: int
    detokenizer: Detokenizer | None


class Engine:
    """See the module docstring.

    tokenizer: needed for string prompts, text and stop texts. kv_cache_tokens: size of the KV
    cache in tokens; it is rounded up to whole blocks. max_tokens_per_step: longer prompts are
    computed in chunks. max_requests: requests that run at once; others wait.
    """

    def __init__(
        self,
        executable: ServingExecutable,
        tokenizer: Any = None,
        eos_token_ids: Sequence[int] = (),
        *,
        block_size: int = 16,
        kv_cache_tokens: int = 8192,
        max_tokens_per_step: int = 512,
        max_requests: int = 64,
    ) -> None:
        self.executable, self.tokenizer = executable, tokenizer
        self._eos = frozenset(eos_token_ids)
        num_blocks = -(-kv_cache_tokens // block_size) + 1
        self._pool = BlockPool(num_blocks, block_size)
        self._scheduler = Scheduler(
            self._pool, max_tokens_per_step=max_tokens_per_step, max_requests=max_requests
        )
        self._runner = Runner(executable, num_blocks, block_size)
        self._live: dict[int, _Live] = {}
        self._next_id = 0
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._entropy = random.SystemRandom()

    @property
    def has_work(self) -> bool:
        """True while any request is unfinished."""
        return self._scheduler.has_work

    @property
    def stats(self) -> EngineStats:
        """A snapshot."""
        return EngineStats(
            self._steps,
            self._prompt_tokens,
            self._generated_tokens,
            self._scheduler.preemptions,
            len(self._scheduler.running),
            len(self._scheduler.waiting),
            self._pool.used,
            self._pool.free,
        )

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queue a request; returns its id.

        Raises RequestError (CapacityError when it could never fit) before anything changes.
        """
        params = params or SamplingParams()
        tokens = self._encode(prompt)
        if params.stop and self.tokenizer is None:
            raise RequestError("stop texts need a tokenizer; use stop_token_ids")
        limit = self.executable.max_context
        if limit is not None and len(tokens) + params.max_tokens > limit:
            raise RequestError(
                f"{len(tokens)} prompt tokens and max_tokens={params.max_tokens} exceed the "
                f"model's context of {limit}"
            )
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos)
        request = Request(self._next_id, tokens, params, ends)
        self._scheduler.submit(request)
        self._next_id += 1
        seed = self._entropy.getrandbits(63) if params.seed is None else params.seed
        text = None if self.tokenizer is None else Detokenizer(self.tokenizer, params.stop)
        self._live[request.request_id] = _Live(request, seed, text)
        self._prompt_tokens += len(tokens)
        return request.request_id

    def cancel(self, request_id: int) -> TokenEvent:
        """End a request now. Raises RequestError when it is not waiting or running."""
        self._scheduler.cancel(request_id)
        live = self._live.pop(request_id)
        text = None if live.detokenizer is None else live.detokenizer.finish()
        return TokenEvent(request_id, None, text, "cancelled")

    def step(self) -> list[TokenEvent]:
        """Compute one batch; returns the tokens it gave.

        When the executable raises, the error propagates and the engine stays usable: the same
        rows are scheduled again by the next step.
        """
        plan = self._scheduler.schedule()
        if not plan.rows:
            return []
        try:
            sampled = self._sample(plan)
        except BaseException:
            self._scheduler.abandon(plan)
            raise
        self._steps += 1
        advanced = self._scheduler.commit(plan, sampled)
        self._generated_tokens += len(advanced)
        return [self._event(request) for request in advanced]

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete all prompts, batched together; results in the order of the prompts."""
        many = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(many) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts but {len(many)} sampling settings")
        ids: list[int] = []
        try:
            for prompt, one in zip(prompts, many, strict=True):
                ids.append(self.submit(prompt, one))
            lives = {request_id: self._live[request_id] for request_id in ids}
            while any(request_id in self._live for request_id in ids):
                self.step()
        except BaseException:
            self._cancel_all(ids)
            raise
        return [_completion(lives[request_id]) for request_id in ids]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[TokenEvent]:
        """Complete one prompt; an event a token. Closing the iterator cancels the request."""
        request_id = self.submit(prompt, params)
        return self._events_of(request_id)

    def _events_of(self, request_id: int) -> Iterator[TokenEvent]:
        try:
            while request_id in self._live:
                yield from [e for e in self.step() if e.request_id == request_id]
        finally:
            self._cancel_all([request_id])

    def _cancel_all(self, ids: Sequence[int]) -> None:
        for request_id in ids:
            if request_id in self._live:
                self.cancel(request_id)

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("a string prompt needs a tokenizer; pass token ids")
            prompt = list(self.tokenizer.encode(prompt))
        tokens = token_tuple(prompt)
        if not tokens:
            raise RequestError("the prompt is empty")
        if min(tokens) < 0 or max(tokens) >= self.executable.vocab_size:
            raise RequestError(
                f"token ids must be 0..{self.executable.vocab_size - 1}, "
                f"got {min(tokens)}..{max(tokens)}"
            )
        return tokens

    def _sample(self, plan: StepPlan) -> dict[int, int]:
        logits = self._runner.run(plan)
        wanted = [rows.request_id for rows in plan.rows if rows.sample]
        if not wanted:
            return {}
        rows = [
            SamplingRow(live.request.params, live.seed, live.request.length)
            for live in map(self._live.__getitem__, wanted)
        ]
        return dict(zip(wanted, sample(logits, rows), strict=True))

    def _event(self, request: Request) -> TokenEvent:
        live = self._live[request.request_id]
        token = request.output[-1]
        text: str | None = None
        if live.detokenizer is not None:
            # An end token is not part of the text.
            text = "" if token in request.end_tokens else live.detokenizer.push(token)
            if live.detokenizer.stopped and request.finish_reason != "stop":
                if request.finish_reason is None:
                    self._scheduler.cancel(request.request_id)
                request.finish_reason = "stop"
            if request.finish_reason is not None:
                text += live.detokenizer.finish()
        if request.finish_reason is not None:
            del self._live[request.request_id]
        return TokenEvent(request.request_id, token, text, request.finish_reason)


def _completion(live: _Live) -> Completion:
    request = live.request
    assert request.finish_reason is not None
    text = None if live.detokenizer is None else live.detokenizer.text
    return Completion(request.prompt, tuple(request.output), text, request.finish_reason, live.seed)
