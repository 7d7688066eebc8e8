"""The scheduler alone: plans are values, so no model is needed."""

from __future__ import annotations

import random
from typing import Any

import pytest

from graphopt.errors import CapacityError, RequestError
from graphopt.runtime.blocks import BlockPool
from graphopt.runtime.request import Request, SamplingParams, Status
from graphopt.runtime.scheduler import Scheduler, StepPlan


def scheduler(blocks: int = 20, size: int = 4, tokens: int = 16, requests: int = 8) -> Scheduler:
    return Scheduler(BlockPool(blocks + 1, size), max_tokens_per_step=tokens, max_requests=requests)


def request(request_id: int, prompt: int = 5, max_tokens: int = 4) -> Request:
    return Request(
        request_id,
        tuple(random.randrange(90) for _ in range(prompt)),
        SamplingParams(max_tokens=max_tokens),
        end_tokens=frozenset({99}),
    )


def answers(plan: StepPlan, token: int = 1) -> dict[int, int]:
    return {rows.request_id: token for rows in plan.rows if rows.sample}


def step(s: Scheduler) -> StepPlan:
    plan = s.schedule()
    s.commit(plan, answers(plan))
    s.pool.check()
    return plan


def shape(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    return [(r.request_id, r.start, len(r.tokens), r.sample) for r in plan.rows]


def test_prompt_then_one_token_a_step() -> None:
    s, r = scheduler(), request(0, prompt=5, max_tokens=3)
    s.submit(r)
    assert shape(step(s)) == [(0, 0, 5, True)]
    assert shape(step(s)) == [(0, 5, 1, True)]
    assert shape(step(s)) == [(0, 6, 1, True)]
    assert r.status is Status.FINISHED
    assert r.finish_reason == "length"
    assert r.output == [1, 1, 1]
    assert not s.has_work
    assert step(s).rows == ()
    assert s.pool.num_used == 0


def test_rows_carry_tokens_and_blocks() -> None:
    s, r = scheduler(size=4), request(0, prompt=5)
    s.submit(r)
    (rows,) = s.schedule().rows
    assert rows.tokens == r.prompt
    assert rows.block_ids == tuple(r.blocks)
    assert len(rows.block_ids) == 2


def test_long_prompt_is_chunked_and_only_the_last_chunk_samples() -> None:
    s = scheduler(tokens=4)
    s.submit(request(0, prompt=10))
    plans = [shape(step(s))[0] for _ in range(4)]
    assert plans == [(0, 0, 4, False), (0, 4, 4, False), (0, 8, 2, True), (0, 10, 1, True)]


def test_decoding_goes_on_beside_a_chunked_prompt() -> None:
    s = scheduler(tokens=6)
    s.submit(request(0, prompt=3, max_tokens=9))
    step(s)
    s.submit(request(1, prompt=12))
    for start in (0, 5):
        assert shape(step(s)) == [(0, s.requests[0].length - 2, 1, True), (1, start, 5, False)]
    assert [(r.request_id, r.sample) for r in step(s).rows] == [(0, True), (1, True)]


def test_end_token_stops() -> None:
    s, r = scheduler(), request(0, max_tokens=4)
    s.submit(r)
    plan = s.schedule()
    assert s.commit(plan, answers(plan, 99)) == [r]
    assert r.finish_reason == "stop"
    assert s.pool.num_used == 0


def test_max_requests_bounds_the_batch() -> None:
    s = scheduler(requests=2, tokens=100)
    for i in range(4):
        s.submit(request(i))
    assert [r.request_id for r in step(s).rows] == [0, 1]
    assert len(s.waiting) == 2


def test_admission_waits_for_blocks_of_the_whole_prompt_and_nobody_overtakes() -> None:
    s = scheduler(blocks=5, size=4)
    s.submit(request(0, prompt=8, max_tokens=2))
    step(s)
    s.submit(request(1, prompt=16, max_tokens=2))
    s.submit(request(2, prompt=1, max_tokens=2))
    assert [r.request_id for r in step(s).rows] == [0]
    assert [r.request_id for r in step(s).rows] == [1]


def test_request_that_never_fits_is_refused_and_others_go_on() -> None:
    s = scheduler(blocks=5, size=4)
    s.submit(request(0))
    with pytest.raises(
        CapacityError, match="need room for 21 tokens, the KV cache has room for 20"
    ):
        s.submit(request(1, prompt=18, max_tokens=4))
    # The last sampled token is never written, so this one just fits.
    s.submit(request(2, prompt=17, max_tokens=4))
    while s.has_work:
        step(s)
    assert s.pool.num_used == 0


@pytest.mark.parametrize("name", ["max_tokens_per_step", "max_requests"])
def test_limits_are_checked(name: str) -> None:
    limits: dict[str, Any] = {"max_tokens_per_step": 1, "max_requests": 1, name: 0}
    with pytest.raises(RequestError, match=f"{name}=0"):
        Scheduler(BlockPool(4, 4), **limits)


def test_youngest_is_preempted_and_comes_back_first() -> None:
    s = scheduler(blocks=4, size=2, tokens=20)
    old, young, late = request(0, 4, 5), request(1, 3, 4), request(2, 1, 1)
    s.submit(old)
    s.submit(young)
    plan = s.schedule()
    s.commit(plan, answers(plan, 7))
    s.submit(late)
    plan = step(s)
    # `old` needed a third block; `young` gave up both of its own, and nobody was admitted.
    assert [r.request_id for r in plan.rows] == [0]
    assert young.status is Status.WAITING
    assert (young.computed, young.blocks, young.preemptions) == (0, [], 1)
    assert [r.request_id for r in s.waiting] == [1, 2]
    assert young.output == [7]
    seen = []
    while s.has_work:
        seen.append(shape(step(s)))
    # It computes prompt and output again in one go, then samples the next token.
    assert (1, 0, 4, True) in [rows for plan_ in seen for rows in plan_]
    assert len(young.output) == 4
    assert old.preemptions == 0


def test_youngest_without_a_block_pauses_instead_of_losing_its_work() -> None:
    s = scheduler(blocks=3, size=2, tokens=20)
    old, young = request(0, 3, 2), request(1, 2, 3)
    s.submit(old)
    s.submit(young)
    step(s)
    assert s.pool.num_free == 0
    assert [r.request_id for r in step(s).rows] == [0]
    assert old.status is Status.FINISHED
    assert young.computed == 2
    assert shape(step(s)) == [(1, 2, 1, True)]
    assert s.preemptions == 0


@pytest.mark.parametrize("when", ["waiting", "prefilling", "decoding", "preempted"])
def test_cancel_frees_everything(when: str) -> None:
    s = scheduler(blocks=4, size=2, tokens=20 if when == "preempted" else 4)
    other, victim = request(0, 4, 5), request(1, 3, 4)
    if when == "preempted":
        s.submit(other)
        s.submit(victim)
        step(s)
        step(s)
        assert victim.preemptions == 1
    else:
        victim = request(1, 7, 2)
        s.submit(victim)
        for _ in range({"waiting": 0, "prefilling": 1, "decoding": 2}[when]):
            step(s)
    s.cancel(1)
    assert victim.status is Status.FINISHED
    assert victim.finish_reason == "cancelled"
    assert victim.blocks == []
    s.check()
    while s.has_work:
        step(s)
    assert s.pool.num_used == 0


def test_cancel_of_unknown_or_finished_raises() -> None:
    s = scheduler()
    with pytest.raises(RequestError, match="no request 5"):
        s.cancel(5)
    s.submit(request(0))
    s.cancel(0)
    with pytest.raises(RequestError, match="no request 0"):
        s.cancel(0)


def test_cancel_between_schedule_and_commit() -> None:
    s = scheduler()
    gone, stays = request(0), request(1)
    s.submit(gone)
    s.submit(stays)
    plan = s.schedule()
    s.cancel(0)
    # The same id, used again meanwhile, is another request: the plan's rows are not its own.
    again = request(0)
    s.submit(again)
    assert s.commit(plan, answers(plan)) == [stays]
    assert gone.output == []
    assert (again.computed, again.output) == (0, [])


def test_used_id_is_refused() -> None:
    s = scheduler()
    s.submit(request(3))
    with pytest.raises(RequestError, match="request id 3 is already in use"):
        s.submit(request(3))


def test_stale_plans_are_refused() -> None:
    s = scheduler()
    s.submit(request(0))
    first = s.schedule()
    second = s.schedule()
    assert first.rows == second.rows
    with pytest.raises(RuntimeError, match="plan 1 is stale"):
        s.commit(first, answers(first))
    s.commit(second, answers(second))
    with pytest.raises(RuntimeError, match="plan 2 is stale"):
        s.commit(second, answers(second))


@pytest.mark.parametrize("sampled", [{}, {0: 1}, {0: 1, 1: 1, 2: 1}])
def test_missing_or_unknown_tokens_change_nothing(sampled: dict[int, int]) -> None:
    s = scheduler()
    s.submit(request(0))
    s.submit(request(1))
    plan = s.schedule()
    with pytest.raises(RuntimeError, match=r"tokens were wanted for requests \[0, 1\]"):
        s.commit(plan, sampled)
    assert [r.computed for r in s.running] == [0, 0]
    s.commit(plan, answers(plan))


def test_check_notices_a_lost_block() -> None:
    s = scheduler()
    s.submit(request(0))
    plan = s.schedule()
    s.running[0].blocks.pop()
    with pytest.raises(RuntimeError, match="requests hold 1 blocks; the pool has 2 used"):
        s.commit(plan, answers(plan))


def test_continuous_arrivals_starve_nobody() -> None:
    s = scheduler(blocks=12, size=2, tokens=5, requests=4)
    first = request(0, prompt=6, max_tokens=6)
    s.submit(first)
    step(s)
    steps_of_first, finished = 0, []
    for i in range(1, 300):
        r = request(i, prompt=random.randint(1, 9), max_tokens=random.randint(1, 9))
        s.submit(r)
        plan = s.schedule()
        if first.status is not Status.FINISHED:
            steps_of_first += 1
            assert any(rows.request_id == 0 for rows in plan.rows)
        s.commit(plan, answers(plan))
        if first.status is Status.FINISHED:
            finished.append(i)
    assert steps_of_first <= 7
    pending = sorted(s.requests)
    while s.has_work:
        step(s)
    # First come, first served: what was left were the latest arrivals, apart from one batch.
    assert pending[0] + 4 >= pending[-1] - len(pending) + 1


def test_preemption_storm_ends_with_every_request_complete() -> None:
    s = scheduler(blocks=10, size=2, tokens=64, requests=64)
    requests = [request(i, random.randint(1, 6), random.randint(5, 14)) for i in range(40)]
    for r in requests:
        s.submit(r)
    steps = 0
    while s.has_work:
        step(s)
        steps += 1
        assert steps < 2000
    assert all(len(r.output) == r.params.max_tokens for r in requests)
    assert s.preemptions > 0
    assert max(r.preemptions for r in requests) <= 10
