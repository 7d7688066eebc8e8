"""From a StepPlan to logits: the only file that knows the serving graph's inputs."""

from __future__ import annotations

import numpy as np
import torch
from graphopt.codegen.backend import ServingExecutable
from graphopt.runtime.scheduler import StepPlan
from torch import Tensor


class Runner:
    """Executes plans over one KV cache of `num_blocks` blocks."""

    def __init__(self, executable: ServingExecutable, num_blocks: int, block_size: int) -> None:
        self.executable, self.block_size = executable, block_size
        self.cache = executable.new_cache(num_blocks, block_size)

    def run(self, plan: StepPlan) -> Tensor:
        """Logits `[L, V]` of the rows that asked for a sample, in the plan's order."""
        rows = plan.rows
        counts = [len(r.tokens) for r in rows]
        total = sum(counts)
        columns = max(len(r.block_ids) for r in rows)
        tokens = np.empty(total, np.int64)
        positions = np.empty(total, np.int64)
        slots = np.empty(total, np.int64)
        tables = np.zeros((len(rows), columns), np.int64)
        query_start = np.zeros(len(rows) + 1, np.int64)
        kv_lens = np.empty(len(rows), np.int64)
        wanted = []
        first = 0
        for i, (r, count) in enumerate(zip(rows, counts, strict=True)):
            last = first + count
            tokens[first:last] = r.tokens
            place = np.arange(r.start, r.start + count)
            positions[first:last] = place
            tables[i, : len(r.block_ids)] = r.block_ids
            slots[first:last] = (
                tables[i, place // self.block_size] * self.block_size + place % self.block_size
            )
            query_start[i + 1] = last
            kv_lens[i] = r.start + count
            if r.sample:
                wanted.append(last - 1)
            first = last
        return self.executable(
            self.cache,
            tokens=torch.from_numpy(tokens),
            positions=torch.from_numpy(positions),
            slots=torch.from_numpy(slots),
            query_start=torch.from_numpy(query_start),
            kv_lens=torch.from_numpy(kv_lens),
            block_tables=torch.from_numpy(tables),
            logit_rows=torch.tensor(wanted, dtype=torch.int64),
        )
