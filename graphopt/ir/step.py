"""The step of a serving graph, stated once: the inputs before its caches.

A step computes token rows of several requests. The rows of all requests lie on one axis; every
input is an int64 tensor. Runner, backends, oracle, costs and passes read this statement.
"""

from __future__ import annotations

from dataclasses import dataclass

ROWS, REQUESTS, REQUESTS_PLUS_1 = "rows", "requests", "requests_plus_1"
BLOCK_COLUMNS, LOGIT_ROWS = "block_columns", "logit_rows"
BLOCKS, BLOCK_SIZE = "blocks", "block_size"
"""Names of the sizes that the axes of step inputs and caches have."""


@dataclass(frozen=True, slots=True)
class StepInput:
    """One int64 input. axes: name of the size of each. meaning: in words."""

    name: str
    axes: tuple[str, ...]
    meaning: str

    @property
    def is_per_row(self) -> bool:
        """True for one number per token row or row of logits, False for what is per request."""
        return self.axes[0] in (ROWS, LOGIT_ROWS)


STEP = (
    StepInput("tokens", (ROWS,), "token id of each row"),
    StepInput("positions", (ROWS,), "position of each row in its request, from 0"),
    StepInput("slots", (ROWS,), "where its keys and values go: block * block_size + offset"),
    StepInput("query_start", (REQUESTS_PLUS_1,), "first row of each request, then all rows"),
    StepInput("kv_lens", (REQUESTS,), "tokens of each request, those of this step included"),
    StepInput("block_tables", (REQUESTS, BLOCK_COLUMNS), "blocks of each request, in order"),
    StepInput("logit_rows", (LOGIT_ROWS,), "the rows whose logits are wanted"),
)
