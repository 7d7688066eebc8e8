"""The reference backend: every op by its definition, on any device, node by node.

Slow and obvious. It is the oracle of the other backends and what they fall back to.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphopt.codegen.backend import BackendKind, Cache, check_weights
from graphopt.errors import BackendError, CapacityError, GraphoptError
from graphopt.ir.graph import Graph, op_name
from graphopt.ir.serving_form import check_serving_form
from graphopt.ir.step import STEP
from graphopt.record.calls import KernelCall

KV_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def runnable(graph: Graph) -> fx.GraphModule:
    """The graph as a GraphModule that runs: weights and inputs have names of their own, since those
    of the model may mean something in the code that FX writes."""
    check_weights(graph)
    names: dict[str, str] = {}
    new_fx = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    root = torch.nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr":
            flat = names.setdefault(str(node.target), f"weight_{len(names)}")
            root.register_buffer(flat, graph.weights[str(node.target)], persistent=False)
            copied[node] = new_fx.get_attr(flat)
        elif node.op == "placeholder":
            copied[node] = new_fx.placeholder(f"input_{len(copied)}")
        else:
            copied[node] = new_fx.node_copy(node, copied.__getitem__)
            copied[node].meta = {}
    return fx.GraphModule(root, new_fx)


@contextmanager
def as_defined(name: str) -> Iterator[None]:
    """Within, ops compute what they say, whatever torch.autocast the caller is in, and what torch
    raises becomes a BackendError; ids outside a table stay IndexErrors, which the caller can tell
    better."""
    try:
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            yield
    except (GraphoptError, IndexError):
        raise
    except Exception as error:
        raise BackendError(f"{name} could not be run: {type(error).__name__}: {error}") from error


@dataclass(frozen=True, slots=True, eq=False)
class TensorCache:
    """Key and value storage as plain tensors, in the order of the graph's cache inputs."""

    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self.tensors)


def cache_shapes(graph: Graph) -> list[tuple[int, int, torch.dtype]]:
    """(kv heads, width, dtype) of each cache input, in order."""
    caches = {spec.name for spec in graph.inputs if spec.kind == "cache"}
    shapes = []
    for node in graph.nodes:
        if node.op == "placeholder" and node.target in caches:
            value = node.meta["val"]
            shapes.append((int(value.shape[2]), int(value.shape[3]), value.dtype))
    return shapes


def make_cache(
    graph: Graph, num_blocks: int, block_size: int, kv_dtype: torch.dtype | None
) -> TensorCache:
    """Zeroed storage for a serving graph.

    Raises BackendError for storage types, CapacityError for sizes that memory does not allow.
    """
    if kv_dtype is not None and kv_dtype not in KV_DTYPES:
        raise BackendError(f"kv_dtype {kv_dtype} is not supported; supported: {KV_DTYPES}")
    wanted = num_blocks * block_size * cache_bytes_per_token(graph, kv_dtype)
    refusal = CapacityError(
        f"a KV cache of {num_blocks} blocks of {block_size} tokens takes {wanted:,} bytes, more "
        "than this machine can give; use fewer blocks"
    )
    # Asking the allocator is not enough: systems promise memory that they do not have.
    if wanted > _physical_memory():
        raise refusal
    try:
        tensors = tuple(
            torch.zeros(
                (num_blocks, block_size, heads, width), dtype=kv_dtype or dtype, device="cpu"
            )
            for heads, width, dtype in cache_shapes(graph)
        )
    except RuntimeError as error:
        raise refusal from error
    return TensorCache(tensors)


def _physical_memory() -> float:
    """Bytes of memory of the machine; infinite where the system does not say."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def cache_bytes_per_token(graph: Graph, kv_dtype: torch.dtype | None) -> int:
    """Bytes of one token's keys and values over all layers."""
    return sum(
        heads * width * (kv_dtype or dtype).itemsize for heads, width, dtype in cache_shapes(graph)
    )


def vocabulary(graph: Graph) -> int:
    """Width of a serving graph's logits."""
    (logits,) = graph.output_nodes
    return int(logits.meta["val"].shape[-1])


class ReferenceForward:
    """A captured graph, run node by node."""

    def __init__(self, graph: Graph) -> None:
        self.name, self.module = graph.name, runnable(graph)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run it. Raises BackendError for what an op refuses as it runs."""
        with as_defined(self.name):
            outputs: tuple[Tensor, ...] = self.module(*inputs)
        return outputs


def kernel_calls(graph: Graph) -> tuple[KernelCall, ...]:
    """Every call runs by its definition."""
    calls = (node for node in graph.nodes if node.op == "call_function")
    return tuple(KernelCall(f"%{node.meta['number']}", op_name(node), False) for node in calls)


class ReferenceServing:
    """A serving graph, run node by node."""

    def __init__(self, graph: Graph, kv_dtype: torch.dtype | None, max_context: int | None) -> None:
        self.graph, self.kv_dtype, self.max_context = graph, kv_dtype, max_context
        self.module = runnable(graph)
        self.vocab_size = vocabulary(graph)
        self.cache_bytes_per_token = cache_bytes_per_token(graph, kv_dtype)
        self.kernel_calls = kernel_calls(graph)

    def original_weights(self) -> dict[str, Tensor]:
        """None: the weights stay in the graph."""
        return {}

    def new_cache(self, num_blocks: int, block_size: int) -> TensorCache:
        """Zeroed storage."""
        return make_cache(self.graph, num_blocks, block_size, self.kv_dtype)

    def __call__(self, cache: Cache, **step: Tensor) -> Tensor:
        """One step."""
        if not isinstance(cache, TensorCache):
            raise BackendError("this cache was made by another executable")
        with as_defined(self.graph.name):
            (logits,) = self.module(*(step[declared.name] for declared in STEP), *cache.tensors)
        assert isinstance(logits, Tensor)
        return logits


class ReferenceBackend:
    """See the module docstring."""

    name = "reference"

    def lower(self, graph: Graph) -> ReferenceForward:
        """Lower a captured graph."""
        return ReferenceForward(graph)

    def lower_serving(
        self, graph: Graph, kv_dtype: torch.dtype | None, max_context: int | None
    ) -> ReferenceServing:
        """Lower a serving graph."""
        check_serving_form(graph)
        return ReferenceServing(graph, kv_dtype, max_context)


KIND = BackendKind(
    name=ReferenceBackend.name,
    make=lambda _threads, _note: ReferenceBackend(),
    kernel_calls=kernel_calls,
)
