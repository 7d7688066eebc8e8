"""The engine: submit requests, step, get tokens. Continuous batching over one executable.

One thread at a time: a call while another thread is in one (all of `generate`, each event of a
stream) is a RequestError at once. An error in a step (of the executable, or logits that are no
distribution) propagates; no token or block is lost, and the next step computes the same rows again.
`generate` and `stream` cancel their own requests then.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from graphopt.codegen.backend import ServingExecutable
from graphopt.errors import RequestError
from graphopt.runtime.blocks import BlockPool
from graphopt.runtime.detokenizer import Detokenizer
from graphopt.runtime.logits_processors import History
from graphopt.runtime.request import (
    Request,
    SamplingParams,
    token_tuple,
    whole_number,
)
from graphopt.runtime.results import Completion, EngineStats, TokenEvent
from graphopt.runtime.runner import Runner
from graphopt.runtime.sampler import NonFiniteLogitsError, SamplingRow, sample
from graphopt.runtime.scheduler import Scheduler, StepPlan

Prompt = str | Sequence[int]
_DEFAULT_CACHE_TOKENS = 8192


@dataclass(slots=True, eq=False)
class _Live:
    """A request between `submit` and its last event. inbox: events that `stream` has not yet given
    or that `generate` does not need; None: they are for the caller of `step`."""

    request: Request
    detokenizer: Detokenizer | None
    inbox: deque[TokenEvent] | None = None


class Engine:
    """See the module docstring.

    tokenizer: needed for string prompts, text and stop texts. eos_token_ids: the model's end
    tokens. defaults: settings of a request that comes without any. shortest_prompt: least
    number of tokens, and why. block_size: tokens a cache block holds. num_blocks (one of them is
    reserved) or kv_cache_bytes: size of the KV cache; with neither it holds 8192 tokens.
    max_tokens_per_step: longer prompts are computed in chunks. max_requests: requests that run at
    once; others wait.

    Raises RequestError for limits below 1 and CapacityError for a cache without room.
    """

    def __init__(
        self,
        executable: ServingExecutable,
        tokenizer: Any = None,
        eos_token_ids: Sequence[int] = (),
        defaults: SamplingParams | None = None,
        shortest_prompt: tuple[int, str] = (1, ""),
        *,
        block_size: int = 16,
        num_blocks: int | None = None,
        kv_cache_bytes: int | None = None,
        max_tokens_per_step: int = 512,
        max_requests: int = 64,
    ) -> None:
        self.executable, self.tokenizer, self._shortest = executable, tokenizer, shortest_prompt
        self._eos = frozenset(eos_token_ids)
        self._defaults = SamplingParams() if defaults is None else defaults
        block_size = whole_number("block_size", block_size)
        max_tokens_per_step = whole_number("max_tokens_per_step", max_tokens_per_step)
        max_requests = whole_number("max_requests", max_requests)
        if num_blocks is not None and kv_cache_bytes is not None:
            raise RequestError("give num_blocks or kv_cache_bytes, not both")
        if kv_cache_bytes is not None:
            kv_cache_bytes = whole_number("kv_cache_bytes", kv_cache_bytes)
            if executable.cache_bytes_per_token == 0:
                raise RequestError(
                    "kv_cache_bytes: this model has no attention and keeps no keys and values; "
                    "limit its tokens with num_blocks"
                )
            num_blocks = kv_cache_bytes // (block_size * executable.cache_bytes_per_token)
        elif num_blocks is None:
            num_blocks = -(-_DEFAULT_CACHE_TOKENS // block_size) + 1
        else:
            num_blocks = whole_number("num_blocks", num_blocks, 0)
        self._pool = BlockPool(num_blocks, block_size)
        self._scheduler = Scheduler(
            self._pool, max_tokens_per_step=max_tokens_per_step, max_requests=max_requests
        )
        self._runner = Runner(executable, num_blocks, block_size)
        self._live: dict[int, _Live] = {}
        self._kept: list[TokenEvent] = []
        self._in_use = threading.RLock()
        self._next_id = 0
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._entropy = random.SystemRandom()

    @property
    def has_work(self) -> bool:
        """True while any request is unfinished, or `step` has events to give."""
        return self._scheduler.has_work or bool(self._kept)

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
            self._pool.num_used,
            self._pool.num_free,
        )

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queue a request; returns its id.

        Raises RequestError (CapacityError when it could never fit) before anything changes.
        """
        params = self._defaults if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(
                f"sampling settings are a SamplingParams, not {type(params).__name__}; write "
                "SamplingParams(max_tokens=3)"
            )
        tokens = self._encode(prompt)
        self._check(tokens, params)
        with self._alone():
            return self._submit(tokens, params)

    def _submit(self, tokens: tuple[int, ...], params: SamplingParams) -> int:
        request = Request(
            self._next_id,
            tokens,
            params,
            seed=self._entropy.getrandbits(63) if params.seed is None else params.seed,
            end_tokens=frozenset(params.stop_token_ids)
            | (frozenset() if params.ignore_eos else self._eos),
        )
        detokenizer = None
        if self.tokenizer is not None:
            detokenizer = Detokenizer(self.tokenizer, tokens, params.stop)
        self._scheduler.submit(request)
        self._next_id += 1
        self._live[request.request_id] = _Live(request, detokenizer)
        self._prompt_tokens += len(tokens)
        return request.request_id

    def cancel(self, request_id: int) -> TokenEvent:
        """End a request now; returns its last event, with the text that was held back. Tokens of it
        that `generate` or a stream computed meanwhile are still to come from `step`.

        Raises RequestError when it is not waiting or running.
        """
        with self._alone():
            self._scheduler.cancel(request_id)
            return self._deliver(self._live[request_id], None, "")

    def step(self) -> list[TokenEvent]:
        """Compute one batch; returns the tokens it gave to requests of `submit`, at most one per
        request, after those that `generate` or a stream computed meanwhile. Each stream gives its
        own events."""
        with self._alone():
            self._advance()
            kept, self._kept = self._kept, []
            return kept

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._in_use.acquire(blocking=False):
            raise RequestError(
                "another thread is using this engine; give each thread an engine of its own, or "
                "call this one from a single thread"
            )
        try:
            yield
        finally:
            self._in_use.release()

    def _advance(self) -> None:
        """Compute one batch; events that are in no inbox are kept for `step`."""
        with self._alone():
            plan = self._scheduler.schedule()
            if not plan.rows:
                return
            advanced = self._scheduler.commit(plan, self._sample(plan))
            self._steps += 1
            self._generated_tokens += len(advanced)
            for live in [self._live[request.request_id] for request in advanced]:
                event = self._event(live)
                if live.inbox is None:
                    self._kept.append(event)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete all prompts, batched together; results in the order of the prompts.

        params: one for all, or one per prompt. Requests made by `submit` advance too; the
        next `step` gives their events. Raises what `submit` and `step` raise; then none
        of the prompts is left in the engine.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise RequestError("generate takes a sequence of prompts; wrap a single one in a list")
        many: list[Any] = (
            list(params) if isinstance(params, list | tuple) else [params] * len(prompts)
        )
        if len(many) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts but {len(many)} sampling settings")
        with self._alone():
            return self._generate(list(zip(prompts, many, strict=True)))

    def _generate(self, asked: Sequence[tuple[Prompt, SamplingParams | None]]) -> list[Completion]:
        lives: list[_Live] = []
        try:
            for prompt, params in asked:
                lives.append(self._submit_with_inbox(prompt, params)[0])
            while any(live.request.finish_reason is None for live in lives):
                self._advance()
        except BaseException:
            self._cancel_unfinished(lives)
            raise
        return [_completion(live) for live in lives]

    def _submit_with_inbox(
        self, prompt: Prompt, params: SamplingParams | None
    ) -> tuple[_Live, deque[TokenEvent]]:
        """A request whose events `step` does not give."""
        with self._alone():
            live = self._live[self.submit(prompt, params)]
            inbox = live.inbox = deque()
            return live, inbox

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Generator[TokenEvent, None, None]:
        """Complete one prompt; an event a token.

        Several streams and other requests may be under way at once: each iterator steps the
        engine when it has no event, and the others (`step`, for requests of `submit`) find theirs
        later. Closing or dropping one
        cancels its request. Raises RequestError at once, not at the first event.
        """
        events = self._events_of(*self._submit_with_inbox(prompt, params))
        # A generator that has not begun would not run its `finally` when it is closed.
        next(events)
        return events

    def _events_of(
        self, live: _Live, inbox: deque[TokenEvent]
    ) -> Generator[TokenEvent, None, None]:
        try:
            yield TokenEvent(live.request.request_id, None, None, None)
            while inbox or live.request.finish_reason is None:
                if inbox:
                    yield inbox.popleft()
                else:
                    self._advance()
        finally:
            self._cancel_unfinished([live])

    def _cancel_unfinished(self, lives: Sequence[_Live]) -> None:
        for live in lives:
            if live.request.finish_reason is None:
                self.cancel(live.request.request_id)

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return token_tuple(prompt)
        if self.tokenizer is None:
            raise RequestError("a string prompt needs a tokenizer; pass token ids")
        return token_tuple(self.tokenizer.encode(prompt))

    def _check(self, tokens: tuple[int, ...], params: SamplingParams) -> None:
        if not tokens:
            raise RequestError("the prompt is empty; it needs at least one token")
        vocabulary = self.executable.vocab_size
        named = (("prompt", token) for token in tokens)
        for name, token in (*named, *params.token_ids()):
            if not 0 <= token < vocabulary:
                raise RequestError(
                    f"{name} has token id {token}; the vocabulary is 0..{vocabulary - 1}"
                )
        if params.stop and self.tokenizer is None:
            raise RequestError("stop texts need a tokenizer; use stop_token_ids")
        shortest, reason = self._shortest
        if len(tokens) < shortest:
            raise RequestError(f"the prompt has {len(tokens)} tokens; {reason}")
        limit = self.executable.max_context
        if limit is not None and len(tokens) > limit:
            raise RequestError(f"the prompt has {len(tokens)} tokens, the program takes {limit}")
        # The last sampled token is never given to the model.
        if limit is not None and len(tokens) + params.max_tokens - 1 > limit:
            raise RequestError(
                f"max_tokens={params.max_tokens} is not allowed for a prompt of {len(tokens)} "
                f"tokens; the program's context of {limit} leaves {limit - len(tokens) + 1}"
            )

    def _sample(self, plan: StepPlan) -> dict[int, int]:
        wanted = [rows.request_id for rows in plan.rows if rows.sample]
        # Looked up before the run: a request may be cancelled during it.
        requests = [self._live[request_id].request for request_id in wanted]
        rows = [SamplingRow(r.params, r.seed, r.length, _history(r)) for r in requests]
        logits_LV = self._runner.run(plan)
        try:
            return dict(zip(wanted, sample(logits_LV, rows), strict=True))
        except NonFiniteLogitsError as error:
            ids = [wanted[row] for row in error.rows]
            raise NonFiniteLogitsError(
                error.rows,
                f"{error.detail}: requests {ids}; cancel them to go on with the others",
            ) from None

    def _event(self, live: _Live) -> TokenEvent:
        request, detokenizer = live.request, live.detokenizer
        token = request.output[-1]
        text = ""
        # An end token is not part of the text.
        if detokenizer is not None and token not in request.end_tokens:
            text = detokenizer.push(token)
            if detokenizer.stopped and request.finish_reason is None:
                self._scheduler.finish(request.request_id, "stop")
        return self._deliver(live, token, text)

    def _deliver(self, live: _Live, token: int | None, text: str) -> TokenEvent:
        request, detokenizer = live.request, live.detokenizer
        if request.finish_reason is not None:
            del self._live[request.request_id]
            if detokenizer is not None:
                text += detokenizer.finish()
                # It may have been complete in the last allowed token, or behind half a character.
                if detokenizer.stopped:
                    request.finish_reason = "stop"
        event = TokenEvent(
            request.request_id, token, None if detokenizer is None else text, request.finish_reason
        )
        if live.inbox is not None:
            live.inbox.append(event)
        return event


def _history(request: Request) -> History | None:
    """What its settings look back on; None when they look at nothing."""
    if not request.params.has_processors:
        return None
    tokens = request.tokens(0, request.length)
    return History(tokens, len(request.prompt), request.end_tokens)


def _completion(live: _Live) -> Completion:
    request = live.request
    assert request.finish_reason is not None
    text = None if live.detokenizer is None else live.detokenizer.text
    return Completion(
        request.prompt, tuple(request.output), text, request.finish_reason, request.seed
    )
