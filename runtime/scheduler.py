"""The scheduler: which token rows run in the next step. Pure: no torch, no clock, no I/O.

`schedule()` returns a frozen `StepPlan`; `commit(plan, sampled)` applies its result. In between,
nothing changes but block ownership, so a plan whose execution failed is simply scheduled again.

First come, first served, without phases: every request's `computed` catches up with its tokens.
Running requests go first, oldest first. A waiting one is admitted, oldest first, when there are
blocks for all its tokens, and gets those blocks at once; nobody overtakes it. Hence only the
youngest running request can be in the middle of its prompt, a running request is never held up by
another's prompt, and the oldest always advances.

When blocks run out, the youngest running request gives all of its blocks back and returns to the
front of the queue; its tokens are kept and computed again (recompute, vLLM arXiv 2309.06180,
section 4.5). It needs more than is then free, so it stays there until somebody finishes. When it is
the youngest itself that needs a block, it pauses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from graphopt.errors import CapacityError, RequestError
from graphopt.runtime.blocks import BlockPool
from graphopt.runtime.request import FinishReason, Request, Status


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

    max_tokens_per_step: rows a step may hold; longer prompts are computed in chunks.
    max_requests: requests running at once; others wait.
    """

    def __init__(self, pool: BlockPool, *, max_tokens_per_step: int, max_requests: int) -> None:
        """Raises RequestError when a limit is below 1."""
        for name, value in (
            ("max_tokens_per_step", max_tokens_per_step),
            ("max_requests", max_requests),
        ):
            if value < 1:
                raise RequestError(f"{name}={value} is not allowed; it must be >= 1")
        self.pool = pool
        self.max_tokens_per_step, self.max_requests = max_tokens_per_step, max_requests
        self.requests: dict[int, Request] = {}
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.preemptions = 0
        self._plans = 0
        self._open: tuple[StepPlan, list[Request]] | None = None

    @property
    def has_work(self) -> bool:
        """True while any request is unfinished."""
        return bool(self.requests)

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises CapacityError when it could never fit, RequestError for an id in use; nothing
        changes then.
        """
        if request.request_id in self.requests:
            raise RequestError(f"request id {request.request_id} is already in use")
        # The last sampled token is never written to the cache.
        tokens = len(request.prompt) + request.params.max_tokens - 1
        if self.pool.blocks_for(tokens) > self.pool.num_total:
            capacity = self.pool.num_total * self.pool.block_size
            raise CapacityError(
                f"{len(request.prompt)} prompt tokens and max_tokens={request.params.max_tokens} "
                f"need room for {tokens} tokens, the KV cache has room for {capacity}; use a "
                "shorter prompt, fewer max_tokens or a larger cache"
            )
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def cancel(self, request_id: int) -> None:
        """End a request now, waiting or running; see `finish`."""
        self.finish(request_id, "cancelled")

    def finish(self, request_id: int, reason: FinishReason) -> None:
        """End a request now and free its blocks; its rows in an open plan are ignored at commit.

        Raises RequestError for an unknown or finished one.
        """
        request = self.requests.pop(request_id, None)
        if request is None:
            raise RequestError(f"no request {request_id} is waiting or running")
        (self.running if request.status is Status.RUNNING else self.waiting).remove(request)
        self._free(request)
        request.finish_reason = reason
        request.move(Status.FINISHED)

    def schedule(self) -> StepPlan:
        """The next step; without rows when there is nothing to do. Replaces an open plan."""
        budget = self.max_tokens_per_step
        planned: list[tuple[Request, int]] = []
        for request in tuple(self.running):
            # An older request may have preempted it since the loop began.
            if request.status is Status.RUNNING:
                count = min(request.pending, budget)
                if self._make_room(request, count):
                    planned.append((request, count))
                    budget -= count
        planned += self._admit(budget)
        self._plans += 1
        plan = StepPlan(self._plans, tuple(_rows(request, count) for request, count in planned))
        self._open = plan, [request for request, _ in planned]
        return plan

    def commit(self, plan: StepPlan, sampled: Mapping[int, int]) -> list[Request]:
        """Apply a step's result; returns the requests that got a token, in the plan's order.

        sampled: request id -> token, for exactly the rows that asked. Raises RuntimeError for a
        plan that is not the open one, or missing or unknown ids; nothing changes then.
        """
        if self._open is None or plan is not self._open[0]:
            raise RuntimeError(f"plan {plan.number} is stale: it is not the one being executed")
        asked = {rows.request_id for rows in plan.rows if rows.sample}
        if asked != sampled.keys():
            raise RuntimeError(
                f"tokens were wanted for requests {sorted(asked)}, given for {sorted(sampled)}"
            )
        requests, self._open = self._open[1], None
        advanced: list[Request] = []
        for rows, request in zip(plan.rows, requests, strict=True):
            if request.status is Status.FINISHED:
                continue
            request.computed = rows.start + len(rows.tokens)
            if rows.sample:
                reason = request.append(sampled[rows.request_id])
                advanced.append(request)
                if reason is not None:
                    self.finish(request.request_id, reason)
        self.check()
        return advanced

    def check(self) -> None:
        """Raise RuntimeError when a block is lost or held by a request that is not running.

        Counts only, cheap enough for every step; `BlockPool.check` looks at every block.
        """
        held = sum(len(request.blocks) for request in self.running)
        used, free, total = self.pool.num_used, self.pool.num_free, self.pool.num_total
        if held != used or used + free != total:
            raise RuntimeError(
                f"requests hold {held} blocks; the pool has {used} used + {free} free of {total}"
            )

    def _make_room(self, request: Request, count: int) -> bool:
        """Give a running request blocks for `count` more rows, at the cost of younger ones."""
        needed = self.pool.blocks_for(request.computed + count) - len(request.blocks)
        while needed > self.pool.num_free:
            if self.running[-1] is request:
                # Pausing keeps its work; an older request that needs its blocks takes them.
                return False
            self._preempt(self.running[-1])
        request.blocks += self.pool.allocate(max(0, needed))
        return True

    def _admit(self, budget: int) -> list[tuple[Request, int]]:
        admitted: list[tuple[Request, int]] = []
        while self.waiting and budget and len(self.running) < self.max_requests:
            request = self.waiting[0]
            needed = self.pool.blocks_for(request.length)
            if needed > self.pool.num_free:
                break
            self.waiting.popleft()
            request.move(Status.RUNNING)
            request.blocks = self.pool.allocate(needed)
            self.running.append(request)
            count = min(request.pending, budget)
            admitted.append((request, count))
            budget -= count
        return admitted

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._free(request)
        request.computed = 0
        request.preemptions += 1
        self.preemptions += 1
        request.move(Status.WAITING)
        self.waiting.appendleft(request)

    def _free(self, request: Request) -> None:
        self.pool.free(request.blocks)
        request.blocks = []


def _rows(request: Request, count: int) -> ScheduledRows:
    start = request.computed
    return ScheduledRows(
        request.request_id,
        request.tokens(start, start + count),
        start,
        tuple(request.blocks),
        sample=start + count == request.length,
    )
