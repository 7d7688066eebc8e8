"""A program may be used by any number of threads, an engine by one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.tiny_models import tiny_llama
from paged_fake import FakeExecutable, greedy

import graphopt
from graphopt.errors import RequestError
from graphopt.runtime import Engine, SamplingParams

THREADS = 8
CALLS = [pytest.param(25, id="25"), pytest.param(1000, marks=pytest.mark.exhaustive, id="1000")]
PROMPTS = [[1, 2, 3], [9, 8, 7, 6, 5, 4], [5] * 40, [77], list(range(20)), [3, 1], [50] * 7, [12]]


@pytest.fixture(scope="module")
def program() -> graphopt.Program:
    return graphopt.compile(tiny_llama(1, vocab_size=101), threads=2)


def in_threads(work: Callable[[int], None], count: int = THREADS) -> None:
    """Run work(0) to work(count - 1) at once; raises what the first of them raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            start.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("calls", CALLS)
def test_threads_call_one_program(program: graphopt.Program, calls: int) -> None:
    """Logits are the same bits as those of one thread."""
    ids = [torch.tensor([prompt]) for prompt in PROMPTS]
    expected = [program(row) for row in ids]
    wrong: list[tuple[int, int]] = []

    def work(number: int) -> None:
        for call in range(calls):
            which = (number + call) % len(ids)
            if not torch.equal(program(ids[which]), expected[which]):
                wrong.append((number, call))

    in_threads(work)
    assert wrong == []


@pytest.mark.parametrize("calls", CALLS)
def test_threads_generate_with_one_program(program: graphopt.Program, calls: int) -> None:
    settings = [
        SamplingParams(max_tokens=5, seed=0),
        SamplingParams(max_tokens=7, temperature=1.0, seed=3, top_p=0.9),
        SamplingParams(max_tokens=3, seed=0, repetition_penalty=1.3),
    ]
    asked = [([prompt, PROMPTS[0]], params) for prompt in PROMPTS for params in settings]
    expected = [program.generate(*pair) for pair in asked]
    wrong: list[tuple[int, int]] = []

    def work(number: int) -> None:
        for call in range(calls):
            which = (5 * number + call) % len(asked)
            if program.generate(*asked[which]) != expected[which]:
                wrong.append((number, call))

    in_threads(work)
    assert wrong == []


def test_threads_with_engines_streams_and_calls_of_one_program(program: graphopt.Program) -> None:
    """Everything at once."""
    ids = torch.tensor([PROMPTS[4]])
    logits = program(ids)
    params = SamplingParams(max_tokens=6)
    expected = [program.generate(prompt, params)[0].tokens for prompt in PROMPTS]

    def work(number: int) -> None:
        for call in range(6):
            which = (number + call) % len(PROMPTS)
            prompt = PROMPTS[which]
            if number % 4 == 0:
                assert torch.equal(program(ids), logits)
            elif number % 4 == 1:
                tokens = [event.token for event in program.stream(prompt, params)]
                assert tuple(tokens) == expected[which]
            elif number % 4 == 2:
                engine = program.engine(block_size=3, num_blocks=40, max_tokens_per_step=4)
                engine.submit(prompt, params)
                events = []
                while engine.has_work:
                    events += engine.step()
                assert tuple(event.token for event in events) == expected[which]
            else:
                completions = program.generate(PROMPTS, params)
                assert [completion.tokens for completion in completions] == expected

    in_threads(work)


USES: dict[str, Callable[[Engine], Any]] = {
    "step": lambda engine: engine.step(),
    "submit": lambda engine: engine.submit([1, 2]),
    "cancel": lambda engine: engine.cancel(0),
    "generate": lambda engine: engine.generate([[1]], SamplingParams(max_tokens=1)),
    "stream": lambda engine: engine.stream([1]),
}


@pytest.mark.parametrize("use", list(USES))
def test_a_second_thread_is_refused_at_any_time_of_generate(
    use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step and between two steps."""
    told: list[object] = []
    owner = threading.current_thread()

    def meddle() -> None:
        if threading.current_thread() is not owner:
            return

        def work() -> None:
            try:
                told.append(USES[use](engine))
            except RequestError as error:
                told.append(str(error))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    class Meddling(FakeExecutable):
        def __call__(self, *args: Any, **inputs: Any) -> Any:
            meddle()
            return super().__call__(*args, **inputs)

    engine = Engine(Meddling())
    advance = engine._advance

    def advance_and_meddle() -> None:
        advance()
        meddle()

    monkeypatch.setattr(engine, "_advance", advance_and_meddle)
    (completion,) = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=5))
    assert list(completion.tokens) == greedy([1, 2, 3], 5)
    assert len(told) == 10
    assert all("another thread is using this engine" in str(text) for text in told)


def test_an_engine_may_wander_from_thread_to_thread() -> None:
    engine = Engine(FakeExecutable())
    engine.submit([1, 2, 3], SamplingParams(max_tokens=THREADS))
    tokens: list[int | None] = []

    def step(number: int) -> None:
        tokens.extend(event.token for event in engine.step())

    for _ in range(THREADS):
        in_threads(step, 1)
    assert tokens == greedy([1, 2, 3], THREADS)
