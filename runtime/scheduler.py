"""The scheduler: which token rows run in the next step. Pure: no torch, no clock, no I/O.

`schedule()` returns a frozen `StepPlan`; `commit(plan, sampled)` applies its result. In between,
nothing changes but block ownership. First come, first served: running requests first, oldest
first, so the oldest always advances. When blocks run out, the youngest running request gives
its blocks back and starts over later; its tokens are kept and computed again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from graphopt.runtime.blocks import BlockPool
from graphopt.runtime.request import Request, Status

from graphopt.errors import CapacityError, RequestError


@dataclass(frozen=True, slots=True)
class ScheduledRows:
    """Consecutive token rows of one request.

    start: position of the first. block_ids: the request's blocks, enough for its context after
    the step. sample: the last row's logits are wanted.
    """

    request_id: int
    tokens: tuple[int, ...]
    start: int
    block_ids: tuple[int, ...]
    sample: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. `number` counts the plans, so a stale one is recognised."""

    number: int
    rows: tuple[ScheduledRows, ...]

    @property
    def num_tokens(self) -> int:
        """Token rows in all."""
        return sum(len(rows.tokens) for rows in self.rows)


class Scheduler:
    """See the module docstring.

    max_tokens_per_step: rows a step may hold; long prompts are computed in chunks.
    max_requests: requests running at once.
    """

    def __init__(self, pool: BlockPool, *, max_tokens_per_step: int, max_requests: int) -> None:
        if max_tokens_per_step < 1 or max_requests < 1:
            raise RequestError("max_tokens_per_step and max_requests must be at least 1")
        self.pool = pool
        self.max_tokens_per_step, self.max_requests = max_tokens_per_step, max_requests
        self.requests: dict[int, Request] = {}
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.preemptions = 0
        self._plans = 0
        self._open: StepPlan | None = None

    def submit(self, request: Request) -> None:
        """Queue a request. Raises CapacityError when it could never fit, RequestError for a used
        id; nothing changes then."""
        if request.request_id in self.requests:
            raise RequestError(f"request id {request.request_id} is already in use")
        # The last sampled token is never written to the cache.
        needed = self.pool.blocks_for(len(request.prompt) + request.params.max_tokens - 1)
        if needed > self.pool.total:
            raise CapacityError(
                f"request needs {needed} blocks of {self.pool.block_size} tokens at its full "
                f"length, the KV cache has {self.pool.total}"
            )
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def cancel(self, request_id: int) -> None:
        """End a request now; its rows in an open plan are ignored at commit. Raises RequestError
        for an unknown or finished one."""
        request = self.requests.get(request_id)
        if request is None:
            raise RequestError(f"no request {request_id} is waiting or running")
        request.finish_reason = "cancelled"
        self._finish(request)

    @property
    def has_work(self) -> bool:
        """True while any request is unfinished."""
        return bool(self.requests)

    def schedule(self) -> StepPlan:
        """The next step; without rows when there is nothing to do."""
        budget = self.max_tokens_per_step
        rows: list[ScheduledRows] = []
        planned: set[int] = set()
        for request in list(self.running):
            if budget == 0:
                break
            if request.status is not Status.RUNNING:
                continue
            count = self._fit(request, budget, planned)
            if count:
                rows.append(self._rows(request, count))
                planned.add(request.request_id)
                budget -= count
        while self.waiting and budget and len(self.running) < self.max_requests:
            request = self.waiting[0]
            count = min(request.pending, budget)
            needed = self.pool.blocks_for(request.computed + count) - len(request.blocks)
            if needed > self.pool.free:
                break
            self.waiting.popleft()
            request.blocks += self.pool.allocate(needed)
            request.move(Status.RUNNING)
            self.running.append(request)
            rows.append(self._rows(request, count))
            budget -= count
        self._plans += 1
        self._open = StepPlan(self._plans, tuple(rows))
        return self._open

    def commit(self, plan: StepPlan, sampled: Mapping[int, int]) -> list[Request]:
        """Apply a step's result: `sampled` maps request id -> token for every row that asked.

        Returns the requests that got a token. Raises RuntimeError for a plan that is not the open
        one or a missing token.
        """
        if plan is not self._open:
            raise RuntimeError(f"plan {plan.number} is not the one being executed")
        self._open = None
        advanced: list[Request] = []
        for rows in plan.rows:
            request = self.requests.get(rows.request_id)
            if request is None:
                continue
            request.computed = rows.start + len(rows.tokens)
            if rows.sample:
                if rows.request_id not in sampled:
                    raise RuntimeError(f"no token was sampled for request {rows.request_id}")
                request.append(sampled[rows.request_id])
                advanced.append(request)
                if request.finish_reason is not None:
                    self._finish(request)
        self.check()
        return advanced

    def abandon(self, plan: StepPlan) -> None:
        """Forget a plan whose execution failed; its rows are computed again."""
        if plan is self._open:
            self._open = None

    def check(self) -> None:
        """Raise RuntimeError when a block is lost or held by a request that is not running."""
        self.pool.check()
        held = sum(len(request.blocks) for request in self.running)
        if held != self.pool.used or any(request.blocks for request in self.waiting):
            raise RuntimeError(f"{held} blocks held by requests, {self.pool.used} in use")

    def _rows(self, request: Request, count: int) -> ScheduledRows:
        start = request.computed
        return ScheduledRows(
            request.request_id,
            request.tokens(start, start + count),
            start,
            tuple(request.blocks),
            sample=start + count == request.length,
        )

    def _fit(self, request: Request, budget: int, planned: set[int]) -> int:
        """Rows this running request can compute now, after making room for them."""
        count = min(request.pending, budget)
        needed = self.pool.blocks_for(request.computed + count) - len(request.blocks)
        while needed > self.pool.free:
            victim = self.running[-1]
            if victim is request or victim.request_id in planned:
                # Only younger requests make room; take what fits without them.
                room = (len(request.blocks) + self.pool.free) * self.pool.block_size
                count = min(count, room - request.computed)
                if count <= 0:
                    self._preempt(request)
                    return 0
                needed = self.pool.blocks_for(request.computed + count) - len(request.blocks)
                break
            self._preempt(victim)
        request.blocks += self.pool.allocate(max(0, needed))
        return count

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.computed = 0
        request.preemptions += 1
        self.preemptions += 1
        request.move(Status.WAITING)
        self.waiting.appendleft(request)

    def _finish(self, request: Request) -> None:
        if request.status is Status.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._release(request)
        request.move(Status.FINISHED)
        del self.requests[request.request_id]

    def _release(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks = []
