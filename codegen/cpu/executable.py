"""A lowered serving graph: weights in kernel layouts, a plan, an arena; one native call per step.

Several threads may call one executable: a step is computed under a lock, because its arena and its
table of addresses are the executable's. The logits belong to the caller.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphopt.codegen.backend import Cache
from graphopt.codegen.cpu import rules_compute, rules_shape, rules_weights
from graphopt.codegen.cpu.abi import Instr, NativeLibrary, Op, Sym, no_memory
from graphopt.codegen.cpu.dtypes import NATIVE_DTYPES
from graphopt.codegen.cpu.lower import LOGITS, Lowering
from graphopt.codegen.cpu.packing import KernelWeight, unpack
from graphopt.codegen.cpu.plan import ARENA, Plan, Segment
from graphopt.codegen.cpu.plan_steps import HostStep
from graphopt.codegen.cpu.views import Extent, View
from graphopt.codegen.reference import (
    KV_DTYPES,
    TensorCache,
    cache_bytes_per_token,
    cache_shapes,
    make_cache,
    vocabulary,
)
from graphopt.errors import BackendError
from graphopt.ir.graph import Graph
from graphopt.ir.step import STEP
from graphopt.record.calls import KernelCall

RULES = {**rules_shape.RULES, **rules_compute.RULES, **rules_weights.RULES}
_CACHE_OPS = (Op.OP_KV_WRITE, Op.OP_PAGED_ATTENTION)
_MATRIX_OPS = (Op.OP_EMBED, Op.OP_LINEAR)


class CpuServing:
    """See the module docstring.

    matrices: kernel layout of each weight read by a linear or an embedding; vectors: the others.
    """

    def __init__(
        self,
        graph: Graph,
        library: NativeLibrary,
        matrices: dict[str, KernelWeight],
        vectors: dict[str, Tensor],
        plan: Plan,
        kv_dtype: torch.dtype | None,
        max_context: int | None,
        threads: int,
    ) -> None:
        self.graph, self.kv_dtype, self.max_context = graph, kv_dtype, max_context
        self.matrices, self.vectors, self.plan = matrices, vectors, plan
        self.vocab_size = vocabulary(graph)
        self.cache_bytes_per_token = cache_bytes_per_token(graph, kv_dtype)
        (logits,) = graph.output_nodes
        self._logits_dtype: torch.dtype = logits.meta["val"].dtype
        self._library, self._threads = library, threads
        self._lock = threading.Lock()
        self._arena = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._bases = (ctypes.c_void_p * (len(plan.externals) + 1))()
        self._syms = (ctypes.c_int64 * Sym.SYM_COUNT)(1)
        self._base_of = {name: base for base, name in enumerate(plan.externals, start=1)}
        self._cache_names = [spec.name for spec in graph.inputs if spec.kind == "cache"]
        self._cache_shapes = cache_shapes(graph)
        self._bound_cache: TensorCache | None = None
        self._host_tensors: dict[int, Tensor] = {}
        for name, base in self._base_of.items():
            kind, _, weight = name.partition(":")
            if kind == "matrix":
                self._bases[base] = matrices[weight].data.data_ptr()
            elif kind == "tensor":
                self._host_tensors[base] = vectors[weight]
                self._bases[base] = vectors[weight].data_ptr()
        self._finish_matrices()

    def _instrs(self) -> list[Instr]:
        return [
            instr
            for segment in self.plan.segments
            if isinstance(segment, Segment)
            for instr in segment.instrs
        ]

    def _finish_matrices(self) -> None:
        """Weight kinds are known only after packing."""
        name_of = {base: name for name, base in self._base_of.items()}
        for instr in self._instrs():
            if instr.op in _MATRIX_OPS:
                weight = self.matrices[name_of[instr.operands[2].base].partition(":")[2]]
                instr.attrs_i[0] = weight.kind
                instr.attrs_i[4] = weight.offset

    @property
    def kernel_calls(self) -> tuple[KernelCall, ...]:
        """What runs, in order."""
        return self.plan.kernel_calls

    def original_weights(self) -> dict[str, Tensor]:
        """The weights that lowering took over, in their original form, bit for bit."""
        originals: dict[str, Tensor] = {}
        for name, weight in self.matrices.items():
            plain = unpack(weight)
            if isinstance(plain, Tensor):
                originals[name] = plain
                continue
            originals[f"{name}.codes"] = plain.codes_NKp
            originals[f"{name}.scale"] = plain.scale_NG
            if plain.zero_NG is not None:
                originals[f"{name}.zero"] = plain.zero_NG
        return originals

    def new_cache(self, num_blocks: int, block_size: int) -> TensorCache:
        """Zeroed storage."""
        return make_cache(self.graph, num_blocks, block_size, self.kv_dtype)

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
        """One step; see `ServingExecutable`.

        Raises BackendError, before anything is computed, for inputs that are not a step's and for
        another executable's cache, CapacityError without memory for so many rows.
        """
        step = (tokens, positions, slots, query_start, kv_lens, block_tables, logit_rows)
        _check_shapes(step)
        with self._lock:
            return self._step(cache, step)

    def _step(self, cache: Cache, step: tuple[Tensor, ...]) -> Tensor:
        if cache is not self._bound_cache:
            cache = self._bind(cache)
        tokens, _, slots, query_start, kv_lens, block_tables, logit_rows = step
        rows = tokens.shape[0]
        try:
            needed = self.plan.arena_fixed + self.plan.arena_per_token * rows + 64
            if self._arena.numel() < needed:
                self._arena = torch.empty(needed, dtype=torch.uint8, device="cpu")
            logits = torch.empty(
                (logit_rows.shape[0], self.vocab_size), dtype=self._logits_dtype, device="cpu"
            )
        except RuntimeError as error:
            raise no_memory(rows) from error
        bases, syms = self._bases, self._syms
        bases[ARENA] = -(-self._arena.data_ptr() // 64) * 64
        self._set(LOGITS, logits)
        for declared, value in zip(STEP, step, strict=True):
            self._set(declared.name, value)
        syms[Sym.SYM_TOKENS] = rows
        syms[Sym.SYM_REQUESTS] = kv_lens.shape[0]
        syms[Sym.SYM_LOGIT_ROWS] = logit_rows.shape[0]
        syms[Sym.SYM_BLOCK_COLUMNS] = block_tables.shape[1]
        followed = (slots, query_start, kv_lens, block_tables, logit_rows)
        self._library.check_step([t.data_ptr() for t in followed], syms, *_size_of(cache))
        for segment in self.plan.segments:
            if isinstance(segment, HostStep):
                self._run_host(segment)
            else:
                self._library.run(segment.instrs, bases, syms, self._threads)
        return logits

    def _run_host(self, step: HostStep) -> None:
        try:
            step.run(self._resolve)
        except (IndexError, RuntimeError) as error:
            # Of torch, which checks every index.
            raise BackendError(f"{step.text} cannot be computed: {error}") from error

    def _set(self, name: str, value: Tensor) -> None:
        base = self._base_of.get(name)
        if base is not None:
            self._bases[base] = value.data_ptr()
            self._host_tensors[base] = value

    def _bind(self, cache: Cache) -> TensorCache:
        """Point the plan at a cache; the block size and storage dtype are the cache's."""
        if not isinstance(cache, TensorCache) or not self._is_ours(cache):
            raise BackendError("this cache was made by another executable")
        dtype_of: dict[int, int] = {}
        for name, tensor in zip(self._cache_names, cache.tensors, strict=True):
            self._set(name, tensor)
            dtype_of[self._base_of[name]] = NATIVE_DTYPES[tensor.dtype]
        block_size, blocks = _size_of(cache)
        for instr in self._instrs():
            if instr.op in _CACHE_OPS:
                instr.attrs_i[0] = block_size
                if instr.op == Op.OP_KV_WRITE:
                    instr.attrs_i[1] = blocks
                for operand in instr.operands:
                    operand.dtype = dtype_of.get(operand.base, operand.dtype)
        self._bound_cache = cache
        return cache

    def _is_ours(self, cache: TensorCache) -> bool:
        """True for a cache as `new_cache` makes it, of any number of blocks of any size."""
        sizes = _size_of(cache)[::-1]
        return [tuple(t.shape) for t in cache.tensors] == [
            (*sizes, heads, width) for heads, width, _ in self._cache_shapes
        ] and all(t.is_contiguous() and t.dtype in KV_DTYPES for t in cache.tensors)

    def _resolve(self, view: View | Extent) -> Any:
        """A torch tensor (or a number) for a host step."""
        if isinstance(view, Extent):
            return view.mult * self._syms[view.sym]
        base, fixed, per_token = self.plan.places[view.buffer]
        sizes = [e.mult * self._syms[e.sym] for e in view.extents]
        if base == ARENA:
            address = self._arena.data_ptr()
            shift = -(-address // 64) * 64 - address
            start = shift + fixed + per_token * self._syms[Sym.SYM_TOKENS] + view.offset
            typed = self._arena[start:]
            typed = typed[: typed.numel() // view.dtype.itemsize * view.dtype.itemsize]
            return typed.view(view.dtype).as_strided(sizes, view.strides)
        storage = self._host_tensors[base]
        start = int(storage.storage_offset()) + view.offset // view.dtype.itemsize
        return storage.as_strided(sizes, view.strides, start)


def _check_shapes(step: tuple[Tensor, ...]) -> None:
    """The kernels read int64 numbers that lie side by side, as many as the others say."""
    rows, requests = step[0].numel(), step[4].numel()
    columns = step[5].shape[-1] if step[5].dim() else 0
    wanted = (step[6].numel(),)
    shapes = ((rows,), (rows,), (rows,), (requests + 1,), (requests,), (requests, columns), wanted)
    for declared, value, shape in zip(STEP, step, shapes, strict=True):
        if value.shape != shape or value.dtype != torch.int64 or not value.is_contiguous():
            raise BackendError(
                f"step input {declared.name!r} is {value.dtype} {list(value.shape)}; it must be "
                f"contiguous torch.int64 [{', '.join(declared.axes)}]"
            )


def _size_of(cache: TensorCache) -> tuple[int, int]:
    """(block size, blocks); no blocks for a model without attention."""
    if not cache.tensors:
        return 1, 0
    blocks, block_size = cache.tensors[0].shape[:2]
    return block_size, blocks


def lowering_of(graph: Graph) -> Lowering:
    """The lowering of a graph with all native rules; no weights are read."""
    return Lowering(graph, RULES)


def lower_serving(
    graph: Graph,
    library: NativeLibrary,
    pack: Callable[[str], KernelWeight],
    kv_dtype: torch.dtype | None,
    max_context: int | None,
    threads: int,
) -> CpuServing:
    """Lower `graph`. `pack(name)` gives a weight's kernel layout."""
    lowering = lowering_of(graph)
    plan = lowering.run()
    # Packing releases the graph's copy: a weight that is read in both ways is kept before.
    vectors = {name: _owned(graph, name) for name in lowering.vectors}
    matrices = {name: pack(name) for name in lowering.matrices}
    return CpuServing(graph, library, matrices, vectors, plan, kv_dtype, max_context, threads)


def _owned(graph: Graph, name: str) -> Tensor:
    """A small weight in memory of its own: as a view it would keep a whole mapped file resident."""
    graph.weights[name] = graph.weights[name].clone(memory_format=torch.contiguous_format)
    return graph.weights[name]
