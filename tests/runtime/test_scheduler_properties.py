"""Random submit, step, cancel and failed steps: what must hold after every one of them."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from graphopt.errors import CapacityError
from graphopt.runtime.blocks import BlockPool
from graphopt.runtime.request import Request, SamplingParams, Status
from graphopt.runtime.scheduler import Scheduler, StepPlan

END = 9


class SchedulerMachine(RuleBasedStateMachine):
    """Keeps its own record of what the cache would hold: slot -> (request, position, token)."""

    @initialize(
        blocks=st.integers(1, 9),
        size=st.integers(1, 4),
        tokens=st.integers(1, 12),
        requests=st.integers(1, 5),
    )
    def start(self, blocks: int, size: int, tokens: int, requests: int) -> None:
        self.scheduler = Scheduler(
            BlockPool(blocks + 1, size), max_tokens_per_step=tokens, max_requests=requests
        )
        self.everyone: list[Request] = []
        self.slots: dict[int, tuple[int, int, int]] = {}
        self.cancelled: set[int] = set()

    @rule(prompt=st.integers(1, 20), max_tokens=st.integers(1, 12))
    def submit(self, prompt: int, max_tokens: int) -> None:
        number = len(self.everyone)
        request = Request(
            number,
            tuple(range(100, 100 + prompt)),
            SamplingParams(max_tokens=max_tokens),
            end_tokens=frozenset({END}),
        )
        pool = self.scheduler.pool
        fits = prompt + max_tokens - 1 <= pool.num_total * pool.block_size
        try:
            self.scheduler.submit(request)
        except CapacityError:
            assert not fits
            assert number not in self.scheduler.requests
        else:
            assert fits
            self.everyone.append(request)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        before = {r.request_id: r.preemptions for r in self.everyone}
        plan = self.scheduler.schedule()
        for rows in plan.rows:
            # Whoever lost its blocks does not get others in the same step.
            assert before[rows.request_id] == self.everyone[rows.request_id].preemptions
        self.check_plan(plan)
        self.write(plan)
        sampled = {r.request_id: data.draw(st.integers(0, END)) for r in plan.rows if r.sample}
        self.commit(plan, sampled)

    @rule()
    def failed_step(self) -> None:
        plan = self.scheduler.schedule()
        self.check_plan(plan)
        # Half of the rows were written when the executable failed.
        self.write(StepPlan(plan.number, plan.rows[: len(plan.rows) // 2]))
        self.scheduler.check()

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        victim = data.draw(st.sampled_from(sorted(self.scheduler.requests)))
        self.scheduler.cancel(victim)
        self.cancelled.add(victim)

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data())
    def cancel_during_step(self, data: st.DataObject) -> None:
        plan = self.scheduler.schedule()
        victim = data.draw(st.sampled_from(sorted(self.scheduler.requests)))
        self.scheduler.cancel(victim)
        self.cancelled.add(victim)
        self.write(plan)
        sampled = {r.request_id: 0 for r in plan.rows if r.sample}
        assert victim not in [r.request_id for r in self.commit(plan, sampled)]

    def commit(self, plan: StepPlan, sampled: dict[int, int]) -> list[Request]:
        lengths = {r.request_id: r.length for r in self.everyone}
        advanced = self.scheduler.commit(plan, sampled)
        for request in advanced:
            assert request.length == lengths[request.request_id] + 1
            assert request.output[-1] == sampled[request.request_id]
        return advanced

    def check_plan(self, plan: StepPlan) -> None:
        s = self.scheduler
        assert plan.num_tokens <= s.max_tokens_per_step
        assert len(s.running) <= s.max_requests
        ids = [rows.request_id for rows in plan.rows]
        assert ids == sorted(ids), "first come, first served"
        assert len(set(ids)) == len(ids)
        if s.has_work:
            # The oldest always advances, so everything ends.
            assert ids
            assert ids[0] == min(s.requests)
        for rows in plan.rows:
            request = s.requests[rows.request_id]
            end = rows.start + len(rows.tokens)
            assert rows.tokens
            assert rows.start == request.computed
            assert rows.tokens == request.tokens(rows.start, end)
            assert rows.sample == (end == request.length)
            assert len(rows.block_ids) * s.pool.block_size >= end
            assert rows.block_ids == tuple(request.blocks)
        # Everyone running gets its token in this step; only the youngest may be in its prompt.
        sampling = {rows.request_id for rows in plan.rows if rows.sample}
        assert sampling >= {request.request_id for request in s.running[:-1]}

    def write(self, plan: StepPlan) -> None:
        for rows in plan.rows:
            for offset, token in enumerate(rows.tokens):
                position = rows.start + offset
                block = rows.block_ids[position // self.scheduler.pool.block_size]
                slot = (
                    block * self.scheduler.pool.block_size
                    + position % self.scheduler.pool.block_size
                )
                self.slots[slot] = (rows.request_id, position, token)

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        s = self.scheduler
        s.pool.check()
        s.check()
        holders = Counter(block for request in self.everyone for block in request.blocks)
        assert all(count == 1 for count in holders.values())
        assert set(holders) == set(s.pool._references)
        assert 0 not in holders
        for request in self.everyone:
            if request.status is not Status.RUNNING:
                assert request.blocks == []

    @invariant()
    def what_counts_as_computed_is_in_the_cache(self) -> None:
        size = self.scheduler.pool.block_size
        for request in self.scheduler.running:
            for position, token in enumerate(request.tokens(0, request.computed)):
                slot = request.blocks[position // size] * size + position % size
                assert self.slots[slot] == (request.request_id, position, token)

    @invariant()
    def queues_hold_each_request_once_in_order(self) -> None:
        s = self.scheduler
        order = [r.request_id for r in s.running] + [r.request_id for r in s.waiting]
        assert order == sorted(s.requests)
        finished = {r.request_id for r in self.everyone if r.status is Status.FINISHED}
        assert finished == {r.request_id for r in self.everyone} - set(order)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        bound = sum(r.length + r.params.max_tokens for r in self.everyone) ** 2 + 1
        for _ in range(bound):
            if not self.scheduler.has_work:
                break
            plan = self.scheduler.schedule()
            self.check_plan(plan)
            self.commit(plan, {r.request_id: 1 for r in plan.rows if r.sample})
        assert not self.scheduler.has_work
        assert self.scheduler.pool.num_used == 0
        for request in self.everyone:
            if request.request_id in self.cancelled:
                assert request.finish_reason == "cancelled"
            elif END in request.output:
                assert request.finish_reason == "stop"
                assert request.output.index(END) == len(request.output) - 1
            else:
                assert request.finish_reason == "length"
                assert len(request.output) == request.params.max_tokens


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
