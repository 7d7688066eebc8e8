"""Random operations on an engine; every request must get what an engine of its own gives it alone.

Requests are submitted, streamed and generated, with any mix of settings, on caches so small that
they wait, pause and are preempted; they are cancelled, streams are dropped, steps fail. After every
operation the blocks and counters are looked at, and every event when it comes.
"""

from __future__ import annotations

import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "runtime"))

from helpers.tiny_models import tiny_llama
from paged_fake import ByteTokenizer

import graphopt
from graphopt.errors import RequestError
from graphopt.runtime import Completion, Engine, SamplingParams, TokenEvent

from .harness import WrongError

VOCABULARY, CONTEXT = 260, 64
END_TOKENS = tuple(range(3, VOCABULARY, 9))
OPERATIONS = (20, 60)
UNKNOWN = 10**6


def must(is_true: bool, *what: Any) -> None:
    """Raise WrongError saying `what`."""
    if not is_true:
        raise WrongError(" ".join(map(str, what)))


class StepError(Exception):
    """A step that was made to fail."""


class Flaky:
    """An executable whose next step fails on request, half the time after it was computed."""

    def __init__(self, executable: Any) -> None:
        self._executable = executable
        self.fails: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executable, name)

    def __call__(self, cache: Any, **step: Any) -> Any:
        fails, self.fails = self.fails, None
        if fails == "before":
            raise StepError
        logits = self._executable(cache, **step)
        if fails == "after":
            raise StepError
        return logits


@dataclass
class Record:
    """A request as its caller sees it. mine: the engine keeps its events for `step`."""

    prompt: tuple[int, ...]
    params: SamplingParams
    expected: Completion
    mine: bool
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: str | None = None
    taken: int = 0
    """Events."""

    def take(self, event: TokenEvent) -> None:
        """The next event: the next token that is expected, the text that goes with it."""
        was_cancelled = self.reason == "cancelled"
        self.taken += 1
        # A stream may compute tokens that the caller of `cancel` has not fetched yet.
        must(self.reason is None or (was_cancelled and event.token is not None), "late", event)
        if event.finish_reason == "cancelled":
            must(event.token is None, "a cancelled request got a token", event)
            self.reason = "cancelled"
            return
        place = len(self.tokens)
        must(event.token is not None, "no token", event)
        must(
            self.expected.tokens[place : place + 1] == (event.token,),
            f"token {place} of {self.prompt} is {event.token}, alone {self.expected.tokens}",
        )
        self.tokens.append(event.token or 0)
        if was_cancelled:
            return
        self.text += event.text or ""
        must((self.expected.text or "").startswith(self.text), self.text, self.expected.text)
        if event.finish_reason is not None:
            self.reason = event.finish_reason
            must(tuple(self.tokens) == self.expected.tokens, "ended early", self.tokens)
            must(self.text == self.expected.text, self.text, self.expected.text)
            must(self.reason == self.expected.finish_reason, self.reason)


class EngineFuzzer:
    """One tiny model for all cases; what a request gives alone is computed once."""

    ci_count = 60

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        model = tiny_llama(1, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT)
        # Logits of a random model lie so close that nothing but the first token would be likely.
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(12)
        # More threads would wait for each other wherever the machine is busy.
        self.executable = graphopt.compile(model, threads=1).executable
        self.alone: dict[tuple[tuple[int, ...], SamplingParams], Completion] = {}

    def engine(self, executable: Any, **options: int) -> Engine:
        return Engine(executable, ByteTokenizer(), END_TOKENS, **options)  # type: ignore[arg-type]

    def expected(self, prompt: tuple[int, ...], params: SamplingParams) -> Completion:
        """What a fresh engine gives."""
        key = (prompt, params)
        if key not in self.alone:
            if len(self.alone) > 20_000:
                self.alone.clear()
            fresh = self.engine(self.executable, num_blocks=CONTEXT + 2, block_size=4)
            (self.alone[key],) = fresh.generate([prompt], params)
        return self.alone[key]

    def run(self, numbers: random.Random, folder: Path) -> int:
        return Run(self, numbers).all()


FUZZER = EngineFuzzer


class Run:
    """One engine and what its callers know."""

    def __init__(self, fuzzer: EngineFuzzer, numbers: random.Random) -> None:
        self.fuzzer, self.numbers = fuzzer, numbers
        self.flaky = Flaky(fuzzer.executable)
        self.block_size = numbers.randint(1, 4)
        self.blocks = numbers.randint(3, 12)
        self.max_requests = numbers.randint(1, 6)
        self.engine = fuzzer.engine(
            self.flaky,
            block_size=self.block_size,
            num_blocks=self.blocks,
            max_tokens_per_step=numbers.choice([1, 2, 5, 16, 64]),
            max_requests=self.max_requests,
        )
        self.records: dict[int, Record] = {}
        self.streams: dict[int, Iterator[TokenEvent]] = {}
        self.stems = [self.tokens(numbers.randint(1, 10)) for _ in range(3)]
        self.prompt_tokens = self.steps = 0
        self.made: defaultdict[int, list[TokenEvent]] = defaultdict(list)
        """Every event the engine made, as it was made, by request."""
        self.watch()

    def watch(self) -> None:
        deliver = self.engine._deliver

        def watched(*arguments: Any) -> TokenEvent:
            event = deliver(*arguments)
            self.made[event.request_id].append(event)
            return event

        self.engine._deliver = watched  # type: ignore[method-assign]

    def tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.numbers.randrange(VOCABULARY) for _ in range(count))

    def prompt(self) -> tuple[int, ...]:
        """Often with a beginning that others have, too."""
        stem = self.numbers.choice([*self.stems, ()])
        return stem + self.tokens(self.numbers.choice([0, 0, 1, 2, 5])) or (1,)

    def params(self) -> SamplingParams:
        """Most settings off, any of them on."""
        n = self.numbers
        kind: dict[str, Any] = {"max_tokens": n.choice([1, 2, 3, 5, 8, 13])}
        if n.random() < 0.5:
            kind |= {"temperature": n.choice([0.3, 1.0, 2.0]), "seed": n.randrange(4)}
        extras: dict[str, Callable[[], Any]] = {
            "top_k": lambda: n.choice([1, 3, 50]),
            "top_p": lambda: n.choice([0.1, 0.7, 0.99]),
            "min_p": lambda: n.choice([0.05, 0.5]),
            "repetition_penalty": lambda: n.choice([0.8, 1.3]),
            "no_repeat_ngram_size": lambda: n.choice([1, 2]),
            "bad_words_ids": lambda: (self.tokens(1), self.tokens(2)),
            "min_tokens": lambda: n.randint(1, 4),
            "suppress_tokens": lambda: self.tokens(20),
            "begin_suppress_tokens": lambda: self.tokens(20),
            "stop": lambda: tuple(chr(n.randint(32, 126)) for _ in range(n.choice([1, 9]))),
            "stop_token_ids": lambda: self.tokens(n.choice([1, 30])),
            "ignore_eos": lambda: True,
        }
        for name in n.sample(list(extras), n.choice([0, 0, 1, 2, 4])):
            kind[name] = extras[name]()
        return SamplingParams(**kind)

    def fits(self, prompt: tuple[int, ...], params: SamplingParams) -> bool:
        needed = len(prompt) + params.max_tokens - 1
        return needed <= min((self.blocks - 1) * self.block_size, CONTEXT)

    def all(self) -> int:
        """Operations, then everything to its end; how many operations there were."""
        n = self.numbers
        operations = [self.submit, self.step, self.cancel, self.stream, self.advance, self.drop]
        operations += [self.generate, self.refused, self.failing]
        weights = [6, 12, 1, 2, 6, 1, 1, 1, 1]
        count = n.randint(*OPERATIONS)
        for operation in n.choices(operations, weights, k=count):
            operation()
            self.check()
        while self.streams:
            n.choice([self.advance, self.advance, self.drop])()
            self.check()
        self.drain()
        return count

    def submit(self) -> None:
        prompt, params = self.prompt(), self.params()
        try:
            number = self.engine.submit(prompt, params)
        except RequestError:
            must(not self.fits(prompt, params), "refused", prompt, params)
            return
        must(self.fits(prompt, params), "does not fit", prompt, params)
        self.add(number, prompt, params, mine=True)

    def add(self, number: int, prompt: tuple[int, ...], params: SamplingParams, mine: bool) -> None:
        must(number not in self.records, "the same id twice", number)
        expected = self.fuzzer.expected(prompt, params)
        self.records[number] = Record(prompt, params, expected, mine)
        self.prompt_tokens += len(prompt)

    def step(self) -> None:
        for event in self.engine.step():
            record = self.records[event.request_id]
            must(record.mine, "the event of a stream came by step", event)
            record.take(event)

    def cancel(self) -> None:
        open_ids = [i for i, record in self.records.items() if record.reason is None]
        if not open_ids or self.numbers.random() < 0.2:
            try:
                self.engine.cancel(UNKNOWN)
            except RequestError:
                return
            raise WrongError("a request that does not exist was cancelled")
        number = self.numbers.choice(open_ids)
        record = self.records[number]
        try:
            event = self.engine.cancel(number)
        except RequestError:
            # It has ended; its caller has not fetched its last event yet.
            must(number not in self.engine._live, "not cancelled", number)
            return
        must(event.request_id == number, event)
        if record.mine:
            record.take(event)

    def stream(self) -> None:
        prompt, params = self.prompt(), self.params()
        if not self.fits(prompt, params):
            return
        number = self.engine._next_id
        self.streams[number] = self.engine.stream(prompt, params)
        self.add(number, prompt, params, mine=False)

    def advance(self) -> None:
        """The next event of a stream; step where there is none."""
        if not self.streams:
            return self.step()
        number = self.numbers.choice(list(self.streams))
        try:
            event = next(self.streams[number])
        except StopIteration:
            del self.streams[number]
            must(self.records[number].reason is not None, "a stream without a last event")
            return None
        must(event.request_id == number, "another request's event", event)
        return self.records[number].take(event)

    def drop(self) -> None:
        """Close a stream, read to its end or not."""
        if self.streams:
            number = self.numbers.choice(list(self.streams))
            self.streams.pop(number).close()  # type: ignore[attr-defined]
            must(number not in self.engine._live, "a dropped stream goes on")
            self.records[number].reason = "dropped"

    def generate(self) -> None:
        wanted = [(self.prompt(), self.params()) for _ in range(self.numbers.randint(1, 3))]
        wanted = [pair for pair in wanted if self.fits(*pair)]
        if self.numbers.random() < 0.3:
            # A seed that the engine draws is told, and repeats the completion.
            wanted = [(prompt, replace(params, seed=None)) for prompt, params in wanted]
        completions = self.engine.generate([p for p, _ in wanted], [s for _, s in wanted])
        must(len(completions) == len(wanted), "completions", len(completions))
        for (prompt, params), got in zip(wanted, completions, strict=True):
            alone = self.fuzzer.expected(prompt, replace(params, seed=got.seed))
            must(got == alone, got, alone)
            self.prompt_tokens += len(prompt)

    def refused(self) -> None:
        """Nothing changes."""
        before = self.engine.stats
        bad: list[tuple[Any, Any]] = [
            ((), None),
            ((VOCABULARY,), None),
            ("text" * 40, SamplingParams(max_tokens=1)),
            (self.tokens(CONTEXT + 1), None),
            ((1,), SamplingParams(max_tokens=CONTEXT + self.blocks * self.block_size)),
            ((1,), SamplingParams(stop_token_ids=(VOCABULARY,))),
            ([1, True], None),
            ((1,), {"max_tokens": 1}),
        ]
        prompt, params = self.numbers.choice(bad)
        calls: list[Callable[[], Any]] = [
            lambda: self.engine.submit(prompt, params),
            lambda: self.engine.stream(prompt, params),
            lambda: self.engine.generate([(1,), prompt], [SamplingParams(max_tokens=1), params]),
        ]
        try:
            self.numbers.choice(calls)()
        except RequestError:
            after = self.engine.stats
            self.prompt_tokens += after.prompt_tokens - before.prompt_tokens
            must(after.prompt_tokens - before.prompt_tokens in (0, 1), "prompt tokens", after)
            same = replace(after, prompt_tokens=before.prompt_tokens)
            must(same == before, "a refusal changed something", before, after)
            return
        raise WrongError(f"not refused: {prompt} {params}")

    def failing(self) -> None:
        """A step that fails changes nothing but that blocks may be given out."""
        self.flaky.fails = self.numbers.choice(["before", "after"])
        chosen = self.numbers.choice([self.step, self.advance, self.generate])
        alive = [number for number in self.streams if number in self.engine._live]
        before = self.engine.stats
        try:
            chosen()
        except StepError:
            for number in alive:
                # The stream that met it has cancelled its request.
                if number not in self.engine._live:
                    must(chosen == self.advance, "a stream was cancelled")
                    self.records[number].reason = "dropped"
                    del self.streams[number]
            after = self.engine.stats
            self.prompt_tokens += after.prompt_tokens - before.prompt_tokens
            must(chosen == self.generate or after.prompt_tokens == before.prompt_tokens, after)
            must(after.generated_tokens == before.generated_tokens, "tokens of a failed step")
        self.flaky.fails = None

    def check(self) -> None:
        """Blocks, counters and queues, after every operation."""
        engine, stats = self.engine, self.engine.stats
        engine._pool.check()
        engine._scheduler.check()
        running = engine._scheduler.running
        holders = Counter(block for request in running for block in request.blocks)
        must(all(count == 1 for count in holders.values()), "a block with two holders", holders)
        must(0 not in holders, "block 0 is in use")
        must(stats.blocks_used == len(holders), "blocks", stats)
        must(stats.blocks_used + stats.blocks_free == self.blocks - 1, "blocks", stats)
        must(stats.running <= self.max_requests, "too many run", stats)
        must(stats.prompt_tokens == self.prompt_tokens, "prompt tokens", stats, self.prompt_tokens)
        must(stats.steps >= self.steps, "steps", stats)
        self.steps = stats.steps
        unfinished = set(engine._live)
        must(stats.running + stats.waiting == len(unfinished), "requests", stats)
        must(engine.has_work == bool(unfinished or engine._kept), "has_work")
        made = [event for events in self.made.values() for event in events]
        tokens = sum(event.token is not None for event in made)
        must(stats.generated_tokens == tokens, "tokens", stats, tokens)
        kept = Counter(event.request_id for event in engine._kept)
        for number, record in self.records.items():
            must(number not in unfinished or record.reason is None, "ended and there", number)
            if record.mine:
                events = len(self.made[number])
                must(record.taken + kept[number] == events, "events of", number, events)

    def drain(self) -> None:
        """Everything ends; every request got all of its events."""
        for _ in range(200 * (len(self.records) + 1)):
            if not self.engine.has_work:
                break
            self.step()
            self.check()
        must(not self.engine.has_work, "it does not end")
        for number, record in self.records.items():
            must(record.reason is not None, "no last event", number, record)
            must(record.taken == len(self.made[number]) or record.reason == "dropped", number)
        must(self.engine.stats.blocks_used == 0, "blocks are left")
        must(self.engine._live == {}, "requests are left")
