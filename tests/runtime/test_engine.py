"""The engine over a fake model that sees its context only through the paged cache."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from paged_fake import VOCABULARY, FakeExecutable, StepError, greedy, logits_of
from torch import from_numpy

from graphopt.errors import BackendError, CapacityError, RequestError
from graphopt.runtime import Completion, Engine, SamplingParams
from graphopt.runtime.sampler import SamplingRow, sample


def prompts(count: int, longest: int = 20) -> list[list[int]]:
    return [
        [random.randrange(VOCABULARY) for _ in range(random.randint(1, longest))]
        for _ in range(count)
    ]


def some_params(**fixed: Any) -> SamplingParams:
    settings: dict[str, Any] = {
        "max_tokens": random.randint(1, 12),
        "temperature": random.choice([0.0, 0.7, 1.5]),
        "top_k": random.choice([0, 0, 7]),
        "top_p": random.choice([1.0, 0.8]),
        "min_p": random.choice([0.0, 0.05]),
        "seed": random.randrange(2**62),
    }
    return SamplingParams(**{**settings, **fixed})


def oracle(prompt: list[int], params: SamplingParams) -> tuple[int, ...]:
    """The tokens without cache, batch or engine."""
    context = list(prompt)
    for _ in range(params.max_tokens):
        row = SamplingRow(params, params.seed or 0, len(context))
        context += sample(from_numpy(logits_of(context))[None], [row])
    return tuple(context[len(prompt) :])


def idle(engine: Engine) -> None:
    stats = engine.stats
    assert not engine.has_work
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    engine._pool.check()


def test_greedy_is_the_oracle() -> None:
    engine = Engine(FakeExecutable(), num_blocks=9, block_size=4)
    (done,) = engine.generate([[5, 6, 7]], SamplingParams(max_tokens=10))
    assert done.tokens == tuple(greedy([5, 6, 7], 10))
    assert done.prompt_tokens == (5, 6, 7)
    assert (done.finish_reason, done.text) == ("length", None)
    idle(engine)


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_many_together_equal_each_alone(block_size: int) -> None:
    asked = prompts(10)
    params = [some_params() for _ in asked]
    engine = Engine(FakeExecutable(), block_size=block_size)
    together = engine.generate(asked, params)
    assert max(engine.executable.row_counts) > 10  # type: ignore[attr-defined]
    for prompt, one, done in zip(asked, params, together, strict=True):
        assert done.tokens == oracle(prompt, one)
        assert done.seed == one.seed
        assert Engine(FakeExecutable(), block_size=block_size).generate([prompt], one) == [done]
    idle(engine)


@pytest.mark.parametrize("chunk", [*range(1, 8), 16])
def test_chunked_prompts_equal_whole_ones(chunk: int) -> None:
    asked = prompts(5, longest=40)
    params = [some_params() for _ in asked]
    executable = FakeExecutable()
    engine = Engine(executable, block_size=4, max_tokens_per_step=chunk)
    for prompt, one, done in zip(asked, params, engine.generate(asked, params), strict=True):
        assert done.tokens == oracle(prompt, one)
    assert max(executable.row_counts) <= chunk
    idle(engine)


def test_preempted_equals_uninterrupted() -> None:
    asked = prompts(12, longest=8)
    params = [some_params(max_tokens=12) for _ in asked]
    engine = Engine(FakeExecutable(), block_size=2, num_blocks=14)
    for prompt, one, done in zip(asked, params, engine.generate(asked, params), strict=True):
        assert done.tokens == oracle(prompt, one)
    assert engine.stats.preemptions > 0
    idle(engine)


def test_random_traffic_changes_no_tokens() -> None:
    """Submissions, cancellations and failing steps in any order, over small random pools."""
    for _ in range(6):
        executable = FakeExecutable()
        executable.fail_at = set(random.sample(range(60), 8))
        engine = Engine(
            executable,
            block_size=random.randint(1, 5),
            num_blocks=random.randint(12, 40),
            max_tokens_per_step=random.randint(1, 20),
            max_requests=random.randint(1, 8),
        )
        asked: dict[int, tuple[list[int], SamplingParams]] = {}
        got: dict[int, list[int]] = {}
        ended: dict[int, str] = {}
        for tick in range(2000):
            if tick < 40 and random.random() < 0.5:
                (prompt,), params = prompts(1, longest=10), some_params()
                try:
                    request_id = engine.submit(prompt, params)
                except CapacityError:
                    continue
                asked[request_id], got[request_id] = (prompt, params), []
            if random.random() < 0.1 and set(asked) - set(ended):
                victim = random.choice(sorted(set(asked) - set(ended)))
                ended[victim] = engine.cancel(victim).finish_reason or ""
            try:
                events = engine.step()
            except StepError:
                engine._scheduler.check()
                engine._pool.check()
                continue
            for event in events:
                assert event.request_id not in ended
                assert event.token is not None
                got[event.request_id].append(event.token)
                if event.finish_reason:
                    ended[event.request_id] = event.finish_reason
            if tick > 40 and not engine.has_work:
                break
        idle(engine)
        assert ended.keys() == asked.keys()
        for request_id, (prompt, params) in asked.items():
            tokens = oracle(prompt, params)
            if ended[request_id] == "cancelled":
                tokens = tokens[: len(got[request_id])]
            assert tuple(got[request_id]) == tokens


def test_end_tokens() -> None:
    prompt = [1, 2, 3]
    tokens = greedy(prompt, 8)
    end = tokens[3]
    until = tuple(tokens[: tokens.index(end) + 1])

    def run(eos: tuple[int, ...], **params: Any) -> Completion:
        return Engine(FakeExecutable(), None, eos).generate(
            [prompt], SamplingParams(max_tokens=8, **params)
        )[0]

    for done in (run((end,)), run((), stop_token_ids=(end,))):
        assert (done.tokens, done.finish_reason) == (until, "stop")
    assert run((end,), ignore_eos=True).tokens == tuple(tokens)
    # Only the model's own are ignored.
    assert run((end,), ignore_eos=True, stop_token_ids=(end,)).tokens == until


def test_unseeded_requests_differ_and_can_be_repeated() -> None:
    engine = Engine(FakeExecutable())
    params = SamplingParams(temperature=3.0, max_tokens=12)
    first, second = engine.generate([[1, 2], [1, 2]], params)
    assert first.seed != second.seed
    assert first.tokens != second.tokens
    again = SamplingParams(temperature=3.0, max_tokens=12, seed=first.seed)
    assert engine.generate([[1, 2]], again)[0].tokens == first.tokens


def test_request_joining_later_changes_nothing() -> None:
    params = some_params(max_tokens=10)
    engine = Engine(FakeExecutable(), max_tokens_per_step=4)
    request_id = engine.submit([4, 5, 6], params)
    tokens = [e.token for e in engine.step()]
    engine.submit(prompts(1, longest=30)[0], some_params())
    while engine.has_work:
        tokens += [e.token for e in engine.step() if e.request_id == request_id]
    assert tuple(tokens) == oracle([4, 5, 6], params)


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "the prompt is empty"),
    ([1, VOCABULARY], {}, f"prompt has token id {VOCABULARY}; the vocabulary is 0..96"),
    ([-1], {}, "prompt has token id -1"),
    ([1.5], {}, "sequence of integer token ids"),
    (7, {}, "sequence of integer token ids"),
    ("text", {}, "needs a tokenizer"),
    ([1] * 31, {"max_tokens": 1}, "the prompt has 31 tokens, the program takes 30"),
    ([1] * 20, {"max_tokens": 12}, "context of 30 leaves 11"),
    ([1] * 20, {"max_tokens": 6}, "need room for 25 tokens, the KV cache has room for 24"),
    ([1], {"stop": ("x",), "max_tokens": 2}, "stop texts need a tokenizer"),
    ([1], {"stop_token_ids": (VOCABULARY,), "max_tokens": 2}, "stop_token_ids has token id 97"),
]


@pytest.mark.parametrize(("prompt", "params", "text"), REFUSED)
def test_refused_before_anything_changes(prompt: Any, params: dict[str, Any], text: str) -> None:
    engine = Engine(FakeExecutable(max_context=30), block_size=4, num_blocks=7)
    before = engine.stats
    fine = SamplingParams(max_tokens=2)

    def second_of_two(wrong: Any, its: SamplingParams) -> None:
        engine.generate([[3], wrong], [fine, its])

    for attempt in (engine.submit, engine.stream, second_of_two):
        with pytest.raises(RequestError, match=text):
            attempt(prompt, SamplingParams(**{"max_tokens": 3, **params}))
        assert engine.stats.blocks_used == 0
        assert not engine.has_work
    assert engine.stats.steps == before.steps == 0


def test_whole_context_and_whole_cache_can_be_used() -> None:
    engine = Engine(FakeExecutable(max_context=24), block_size=4, num_blocks=7)
    for length, new in ((24, 1), (1, 24), (20, 5)):
        prompt = prompts(1)[0][:1] * length
        (done,) = engine.generate([prompt], SamplingParams(max_tokens=new))
        assert done.tokens == tuple(greedy(prompt, new))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"block_size": 0}, "block_size=0"),
        ({"max_requests": 0}, "max_requests=0"),
        ({"max_tokens_per_step": 0}, "max_tokens_per_step=0"),
        ({"num_blocks": 1}, "at least 2 blocks"),
        ({"kv_cache_bytes": 300}, "at least 2 blocks"),
        ({"num_blocks": 9, "kv_cache_bytes": 9000}, "not both"),
        ({"block_size": 2.5}, "block_size=2.5 is not allowed; it must be an integer >= 1"),
        ({"block_size": True}, "block_size=True"),
        ({"num_blocks": "9"}, "num_blocks='9'"),
        ({"kv_cache_bytes": 1e6}, "kv_cache_bytes=1000000.0"),
        ({"kv_cache_bytes": -5}, "kv_cache_bytes=-5"),
        ({"max_tokens_per_step": 2.5}, "max_tokens_per_step=2.5"),
        ({"max_requests": None}, "max_requests=None"),
    ],
)
def test_limits_are_checked(options: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        Engine(FakeExecutable(), **options)


def test_cache_size() -> None:
    # 16 bytes a token, 16 tokens a block, one block reserved.
    assert Engine(FakeExecutable(), kv_cache_bytes=2600).stats.blocks_free == 9
    assert Engine(FakeExecutable(), num_blocks=12).stats.blocks_free == 11
    assert Engine(FakeExecutable()).stats.blocks_free * 16 == 8192


def test_a_model_without_a_cache_cannot_have_its_size_in_bytes() -> None:
    executable = FakeExecutable()
    executable.cache_bytes_per_token = 0
    with pytest.raises(RequestError, match=r"no attention.*num_blocks"):
        Engine(executable, kv_cache_bytes=4096)
    assert Engine(executable, num_blocks=3).stats.blocks_free == 2


def test_limits_may_be_numpy_integers() -> None:
    engine = Engine(FakeExecutable(), block_size=np.int32(4), num_blocks=np.int64(7))
    assert engine.generate([np.array([5, 6])], SamplingParams(max_tokens=2))[0].prompt_tokens == (
        5,
        6,
    )


@pytest.mark.parametrize("params", [{"max_tokens": 3}, 3, "greedy", [{"max_tokens": 3}]])
def test_sampling_settings_of_another_type_are_refused(params: Any) -> None:
    engine = Engine(FakeExecutable())
    with pytest.raises(RequestError, match=r"SamplingParams\(max_tokens=3\)"):
        engine.generate([[1]], params)
    idle(engine)


@pytest.mark.parametrize("wrong", [None, 5, {"a": 1}, iter([[1]])])
def test_prompts_of_another_type_are_refused(wrong: Any) -> None:
    with pytest.raises(RequestError, match="takes a sequence of prompts"):
        Engine(FakeExecutable()).generate(wrong)


def test_generate_wants_a_sequence_of_prompts() -> None:
    engine = Engine(FakeExecutable())
    with pytest.raises(RequestError, match="wrap a single one in a list"):
        engine.generate("text")
    with pytest.raises(RequestError, match="2 prompts but 1 sampling settings"):
        engine.generate([[1], [2]], [SamplingParams()])
    assert engine.generate([]) == []


def test_a_failing_step_propagates_and_loses_nothing() -> None:
    executable = FakeExecutable()
    executable.fail_at = {2, 3}
    engine = Engine(executable, block_size=2, num_blocks=30)
    params = [some_params(max_tokens=6) for _ in range(3)]
    asked = prompts(3, longest=6)
    ids = [engine.submit(p, one) for p, one in zip(asked, params, strict=True)]
    tokens: dict[int, list[int | None]] = {i: [] for i in ids}
    failures = 0
    while engine.has_work:
        used = engine.stats.blocks_used
        try:
            for event in engine.step():
                tokens[event.request_id].append(event.token)
        except StepError:
            failures += 1
            engine._scheduler.check()
            assert engine.stats.blocks_used >= used
    assert failures == 2
    for i, prompt, one in zip(ids, asked, params, strict=True):
        assert tuple(tokens[i]) == oracle(prompt, one)
    idle(engine)


def test_generate_and_stream_leave_nothing_behind_after_an_error() -> None:
    executable = FakeExecutable()
    engine = Engine(executable)
    bystander = engine.submit([9, 9], SamplingParams(max_tokens=3))
    executable.fail_at = {1, 4}
    with pytest.raises(StepError, match="step 1 broke"):
        engine.generate([[1], [2]], SamplingParams(max_tokens=5))
    events = engine.stream([3], SamplingParams(max_tokens=9))
    with pytest.raises(StepError, match="step 4 broke"):
        list(events)
    assert set(engine._live) <= {bystander}
    while engine.has_work:
        engine.step()
    idle(engine)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_diverged_logits_name_the_request(bad: float) -> None:
    executable = FakeExecutable()
    executable.poison_logits_at = {1: bad}
    engine = Engine(executable)
    good, wrong = engine.submit([1, 2]), engine.submit([3, 4])
    engine.step()
    with pytest.raises(BackendError, match=rf"rows \[1\].*requests \[{wrong}\]; cancel them"):
        engine.step()
    assert engine.cancel(wrong).finish_reason == "cancelled"
    assert [e.request_id for e in engine.step()] == [good]


def test_cancel() -> None:
    engine = Engine(FakeExecutable(), max_requests=1)
    running, waiting = engine.submit([1, 2]), engine.submit([3])
    engine.step()
    for request_id in (waiting, running):
        event = engine.cancel(request_id)
        assert (event.request_id, event.token, event.text) == (request_id, None, None)
        assert event.finish_reason == "cancelled"
        with pytest.raises(RequestError, match=f"no request {request_id}"):
            engine.cancel(request_id)
    with pytest.raises(RequestError, match="no request 99"):
        engine.cancel(99)
    idle(engine)
    assert engine.step() == []


def test_a_request_cancelled_while_its_step_runs_gets_no_token() -> None:
    class Cancelling(FakeExecutable):
        def __call__(self, cache: Any, **step: Any) -> Any:
            if self.calls == 1:
                engine.cancel(gone)
            return super().__call__(cache, **step)

    engine = Engine(Cancelling())
    params = SamplingParams(max_tokens=4)
    gone, stays = engine.submit([1, 2], params), engine.submit([3], params)
    events = [event for _ in range(4) for event in engine.step()]
    assert [e.request_id for e in events] == [gone, stays, stays, stays, stays]
    assert [e.token for e in events[1:]] == greedy([3], 4)
    idle(engine)


def test_step_for_others_during_generate() -> None:
    """`generate` steps everybody: a stream finds its events, and what it computes is the same."""
    engine = Engine(FakeExecutable(), block_size=2, num_blocks=20, max_tokens_per_step=3)
    params = some_params(max_tokens=8)
    events = engine.stream([6, 6, 6, 6, 6], params)
    asked = prompts(3, longest=6)
    for prompt, done in zip(asked, engine.generate(asked, params), strict=True):
        assert done.tokens == oracle(prompt, params)
    assert tuple(e.token for e in events) == oracle([6, 6, 6, 6, 6], params)
    idle(engine)


def test_stats() -> None:
    engine = Engine(FakeExecutable(), block_size=4, num_blocks=11, max_requests=2)
    for _ in range(3):
        engine.submit([1, 2, 3, 4, 5], SamplingParams(max_tokens=2))
    stats = engine.stats
    assert (stats.waiting, stats.running, stats.prompt_tokens) == (3, 0, 15)
    engine.step()
    stats = engine.stats
    assert (stats.waiting, stats.running, stats.steps, stats.generated_tokens) == (1, 2, 1, 2)
    assert (stats.blocks_used, stats.blocks_free) == (4, 6)
    while engine.has_work:
        engine.step()
    stats = engine.stats
    assert (stats.generated_tokens, stats.steps, stats.preemptions) == (6, 4, 0)
    idle(engine)
