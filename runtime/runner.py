"""From a StepPlan to logits: the only file that knows the serving graph's inputs."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphopt.codegen.backend import Cache, ServingExecutable
from graphopt.errors import BackendError
from graphopt.runtime.scheduler import ScheduledRows, StepPlan

__all__ = ["Cache", "Runner", "ServingExecutable"]


class Runner:
    """Executes plans over one KV cache of `num_blocks` blocks of `block_size` tokens."""

    def __init__(self, executable: ServingExecutable, num_blocks: int, block_size: int) -> None:
        self.executable, self.block_size = executable, block_size
        self.cache = executable.new_cache(num_blocks, block_size)
        # Block tables change once in `block_size` steps: the rows of the last step are kept.
        self._table = np.zeros((1, 1), np.int64)
        self._table_rows: list[tuple[int, ...]] = [()]

    def run(self, plan: StepPlan) -> Tensor:
        """Logits `[L, V]` of the rows that asked for a sample, in the plan's order.

        Raises BackendError when the executable returns another shape, and whatever it raises.
        """
        rows = plan.rows
        tables_RM = self._block_tables(rows)
        counts_R = np.array([len(r.tokens) for r in rows], np.int64)
        starts_R = np.array([r.start for r in rows], np.int64)
        query_start = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(counts_R, out=query_start[1:])
        row_of_T = np.repeat(np.arange(len(rows)), counts_R)
        positions_T = np.arange(len(row_of_T)) + (starts_R - query_start[:-1])[row_of_T]
        blocks_T, offsets_T = np.divmod(positions_T, self.block_size)
        slots_T = tables_RM[row_of_T, blocks_T] * self.block_size + offsets_T
        wanted = [index for index, r in enumerate(rows) if r.sample]
        # Graphs are compiled for at least one row of logits: in the middle of a prompt, the last.
        logit_rows_L = query_start[1:][wanted or [-1]] - 1
        logits_LV = self.executable(
            self.cache,
            tokens=torch.tensor([token for r in rows for token in r.tokens], device="cpu"),
            positions=torch.from_numpy(positions_T),
            slots=torch.from_numpy(slots_T),
            query_start=torch.from_numpy(query_start),
            kv_lens=torch.from_numpy(starts_R + counts_R),
            block_tables=torch.from_numpy(tables_RM),
            logit_rows=torch.from_numpy(logit_rows_L),
        )
        expected = (len(logit_rows_L), self.executable.vocab_size)
        if logits_LV.shape != expected:
            raise BackendError(f"logits have shape {tuple(logits_LV.shape)}, expected {expected}")
        return logits_LV[: len(wanted)]

    def _block_tables(self, rows: tuple[ScheduledRows, ...]) -> NDArray[np.int64]:
        columns = max(len(r.block_ids) for r in rows)
        height, width = self._table.shape
        if len(rows) > height or columns > width:
            shape = max(len(rows), 2 * height), max(columns, 2 * width)
            self._table = np.zeros(shape, np.int64)
            self._table_rows = [()] * shape[0]
        for index, r in enumerate(rows):
            if self._table_rows[index] != r.block_ids:
                self._table[index, : len(r.block_ids)] = r.block_ids
                self._table[index, len(r.block_ids) :] = 0
                self._table_rows[index] = r.block_ids
        return self._table[: len(rows), :columns].copy()
