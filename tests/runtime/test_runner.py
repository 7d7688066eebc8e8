"""The runner's tensors, against a slow construction by hand."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from paged_fake import FakeExecutable
from torch import Tensor

from graphopt.errors import BackendError
from graphopt.runtime.runner import Runner
from graphopt.runtime.scheduler import ScheduledRows, StepPlan


class Recorder:
    """Keeps the step it is given; NaN logits of any width."""

    max_context = None
    cache_bytes_per_token = 1

    def __init__(self, vocab_size: int = 5, width: int = 5) -> None:
        self.vocab_size, self.width = vocab_size, width
        self.steps: list[dict[str, Tensor]] = []

    def new_cache(self, num_blocks: int, block_size: int) -> Any:
        return FakeExecutable().new_cache(num_blocks, block_size)

    def __call__(self, cache: Any, **step: Tensor) -> Tensor:
        self.steps.append(step)
        return torch.full((len(step["logit_rows"]), self.width), float("nan"))


def expected(plan: StepPlan, block_size: int) -> dict[str, list[Any]]:
    columns = max(len(r.block_ids) for r in plan.rows)
    out: dict[str, list[Any]] = {
        name: [] for name in ("tokens", "positions", "slots", "kv_lens", "block_tables")
    }
    out["query_start"], out["logit_rows"] = [0], []
    for r in plan.rows:
        for offset, token in enumerate(r.tokens):
            position = r.start + offset
            out["tokens"].append(token)
            out["positions"].append(position)
            block = r.block_ids[position // block_size]
            out["slots"].append(block * block_size + position % block_size)
        out["query_start"].append(len(out["tokens"]))
        out["kv_lens"].append(r.start + len(r.tokens))
        out["block_tables"].append(list(r.block_ids) + [0] * (columns - len(r.block_ids)))
        if r.sample:
            out["logit_rows"].append(len(out["tokens"]) - 1)
    # Never empty: many a graph cannot compute nothing.
    out["logit_rows"] = out["logit_rows"] or [len(out["tokens"]) - 1]
    return out


def random_plan(number: int, block_size: int) -> StepPlan:
    rows = []
    for request_id in random.sample(range(20), random.randint(1, 7)):
        start, count = random.randint(0, 30), random.randint(1, 9)
        blocks = -(-(start + count) // block_size) + random.randint(0, 2)
        rows.append(
            ScheduledRows(
                request_id,
                tuple(random.choices(range(90), k=count)),
                start,
                tuple(random.sample(range(1, 99), blocks)),
                random.random() < 0.6,
            )
        )
    return StepPlan(number, tuple(rows))


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_tensors_of_random_plans(block_size: int) -> None:
    executable = Recorder()
    runner = Runner(executable, 99, block_size)
    for number in range(200):
        plan = random_plan(number, block_size)
        logits = runner.run(plan)
        wanted = expected(plan, block_size)
        step = executable.steps[-1]
        assert step.keys() == wanted.keys()
        for name, values in wanted.items():
            assert step[name].tolist() == values, name
            assert step[name].dtype == torch.int64
            assert step[name].is_contiguous()
        assert logits.shape == (sum(r.sample for r in plan.rows), 5)


def test_an_executable_may_keep_its_inputs() -> None:
    executable = Recorder()
    runner = Runner(executable, 99, 4)
    plans = [random_plan(number, 4) for number in range(20)]
    for plan in plans:
        runner.run(plan)
    for plan, step in zip(plans, executable.steps, strict=True):
        assert step["block_tables"].tolist() == expected(plan, 4)["block_tables"]


def test_logits_of_the_wrong_shape_are_refused() -> None:
    runner = Runner(Recorder(vocab_size=5, width=6), 9, 4)
    plan = StepPlan(1, (ScheduledRows(0, (1,), 0, (1,), True),))
    with pytest.raises(BackendError, match=r"shape \(1, 6\), expected \(1, 5\)"):
        runner.run(plan)
