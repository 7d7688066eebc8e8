"""Drives a serving executable by hand: any split of requests into steps, random blocks."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.codegen.backend import ServingExecutable


class Steps:
    """Requests over one cache; `run` computes the next rows of some of them."""

    def __init__(
        self, executable: ServingExecutable, prompts: Sequence[Sequence[int]], block_size: int = 4
    ) -> None:
        self.executable, self.block_size = executable, block_size
        self.tokens = [list(p) for p in prompts]
        self.done = [0] * len(prompts)
        blocks = [-(-len(p) // block_size) for p in prompts]
        numbers = list(range(1, sum(blocks) + 1))
        random.shuffle(numbers)
        self.tables = [[numbers.pop() for _ in range(count)] for count in blocks]
        self.cache = executable.new_cache(sum(blocks) + 1, block_size)
        for storage in getattr(self.cache, "tensors", ()):
            storage.fill_(float("nan"))

    def run(self, counts: Sequence[int]) -> list[Tensor]:
        """Compute `counts[i]` more rows of request i (0: not in this step); logits per request."""
        tokens, positions, slots, starts, lengths, tables = [], [], [], [0], [], []
        columns = max(len(t) for t in self.tables)
        active = [i for i, count in enumerate(counts) if count]
        for i in active:
            place = range(self.done[i], self.done[i] + counts[i])
            tokens += [self.tokens[i][p] for p in place]
            positions += place
            slots += [
                self.tables[i][p // self.block_size] * self.block_size + p % self.block_size
                for p in place
            ]
            self.done[i] += counts[i]
            starts.append(len(tokens))
            lengths.append(self.done[i])
            tables.append(self.tables[i] + [0] * (columns - len(self.tables[i])))
        logits = self.executable(
            self.cache,
            tokens=torch.tensor(tokens),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            query_start=torch.tensor(starts),
            kv_lens=torch.tensor(lengths),
            block_tables=torch.tensor(tables),
            logit_rows=torch.arange(len(tokens)),
        )
        parts = iter(logits.split([counts[i] for i in active]))
        return [next(parts) if count else logits[:0] for count in counts]

    def run_in_chunks(self, chunk: int) -> list[Tensor]:
        """Everything that is left, at most `chunk` rows of each request a step."""
        collected: list[list[Tensor]] = [[] for _ in self.tokens]
        while any(d < len(t) for d, t in zip(self.done, self.tokens, strict=True)):
            counts = [min(chunk, len(t) - d) for d, t in zip(self.done, self.tokens, strict=True)]
            for part, rows in zip(collected, self.run(counts), strict=True):
                part.append(rows)
        return [torch.cat(parts) for parts in collected]
