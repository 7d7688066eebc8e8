"""The one interface of all backends: `lower(graph) -> executable`.

A *captured* graph becomes a `ForwardExecutable`: the graph's inputs in, its outputs out. A
*serving* graph becomes a `ServingExecutable`: a step of token rows of many requests in, logits out,
with the paged KV cache held in an opaque `Cache` that the executable makes and writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from graphopt.errors import BackendError
from graphopt.ir.graph import Graph
from graphopt.record.calls import KernelCall


class Cache(Protocol):
    """Storage of keys and values of all layers, in blocks."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""


class ForwardExecutable(Protocol):
    """A lowered captured graph."""

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run it; inputs in the order of `graph.inputs`."""


class ServingExecutable(Protocol):
    """A lowered serving graph."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""

    @property
    def max_context(self) -> int | None:
        """Longest context the model has positions for; None: no limit is known."""

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, all layers together."""

    @property
    def kernel_calls(self) -> tuple[KernelCall, ...]:
        """What runs, in order; views that cost nothing are not among them."""

    def original_weights(self) -> dict[str, Tensor]:
        """The weights that lowering took out of the graph, in their original form."""

    def new_cache(self, num_blocks: int, block_size: int) -> Cache:
        """Storage for `num_blocks * block_size` tokens."""

    def __call__(
        self,
        cache: Cache,
        *,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        query_start: Tensor,
        kv_lens: Tensor,
        block_tables: Tensor,
        logit_rows: Tensor,
    ) -> Tensor:
        """One step. All inputs int64, contiguous, on the CPU; see `insert_kv_cache` for their
        meaning. Returns float logits `[L, V]`, valid until the next call."""


class Backend(Protocol):
    """Turns graphs into something that runs."""

    @property
    def name(self) -> str:
        """As given to `compile(backend=...)`."""

    def lower(self, graph: Graph) -> ForwardExecutable:
        """Lower a captured graph."""

    def lower_serving(
        self, graph: Graph, kv_dtype: torch.dtype | None, max_context: int | None
    ) -> ServingExecutable:
        """Lower a serving graph. kv_dtype: storage of keys and values, None: as in the graph."""


@dataclass(frozen=True, slots=True)
class BackendKind:
    """A backend as the registry knows it, before it is made ready.

    name: as given to `compile(backend=...)`. make: the backend; raises BackendError where this
    machine cannot run it. It is told how many threads were asked for (None: as many as torch uses)
    and whom to tell of a fallback. kernel_calls: what would run each value of a serving graph,
    planned from shapes alone; raises BackendError when there is no plan for the graph. has_threads:
    whether it has a pool of its own, so that a number of threads can be asked for. falls_back: run
    on the reference backend, with a note, where `make` raises.
    """

    name: str
    make: Callable[[int | None, Callable[[str], None]], Backend]
    kernel_calls: Callable[[Graph], tuple[KernelCall, ...]]
    has_threads: bool = False
    falls_back: bool = False


def check_weights(graph: Graph) -> None:
    """Raise BackendError when a weight has no data: packed and read by an op that cannot, or taken
    over by a program that was compiled from this graph."""
    for name, data in graph.weights.items():
        if data.device.type == "meta" and name not in graph.packed:
            raise BackendError(
                f"weight {name!r} has no data: another program took it over; "
                "graphopt.capture gives a graph that keeps its weights"
            )
        if data.device.type == "meta":
            raise BackendError(
                f"weight {name!r} is packed and no low-bit op reads it; run the pass "
                'fold_low_bit_weights, or load the model with weights="dense"'
            )
