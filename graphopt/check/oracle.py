"""What a graph computes, whichever form it has: the oracle of numeric checks and bisection.

A captured graph is run op by op by the ops' definitions. A serving graph is given whole prompts at
once, each with fresh cache blocks, so that both forms answer the same question: ids -> logits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.check.inputs import check_inputs, input_types, size_limits
from graphopt.codegen.backend import ServingExecutable
from graphopt.codegen.reference import ReferenceBackend
from graphopt.errors import RequestError
from graphopt.ir.assumptions import check_assumptions
from graphopt.ir.graph import Graph
from graphopt.ir.limits import fitting_size

BLOCK_SIZE = 16


def whole_prompt_logits(
    executable: ServingExecutable, ids_BS: Tensor, returned: Sequence[int | torch.SymInt] = ()
) -> Tensor:
    """Logits `[B, S, V]` of one step over B whole prompts.

    returned: sizes of what the model returns; for `[B, V]` and `[B, 1, V]`, symbolic sizes aside,
    the last rows are given in that shape.
    Raises RequestError for prompts longer than the model's context.
    """
    batch, length = ids_BS.shape
    if executable.max_context is not None and length > executable.max_context:
        raise RequestError(f"{length} tokens, the program takes {executable.max_context}")
    blocks = -(-length // BLOCK_SIZE)
    cache = executable.new_cache(batch * blocks, BLOCK_SIZE)
    # Where the caller's default device is another, the program stays where it runs.
    count = functools.partial(torch.arange, device="cpu")
    tables = count(batch * blocks).view(batch, blocks)
    positions = count(length)
    slots = tables[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    is_flat = len(returned) == 2
    is_last = is_flat or (len(returned) == 3 and isinstance(returned[1], int) and returned[1] == 1)
    last = count(1, batch + 1) * length - 1
    logits = executable(
        cache,
        tokens=ids_BS.reshape(-1).contiguous(),
        positions=positions.repeat(batch),
        slots=slots.reshape(-1).contiguous(),
        query_start=count(batch + 1) * length,
        kv_lens=torch.full((batch,), length, device="cpu"),
        block_tables=tables.contiguous(),
        logit_rows=last if is_last else count(batch * length),
    )
    if is_flat:
        return logits
    return logits.view(batch, 1 if is_last else length, -1)


def outputs_of(
    graph: Graph, inputs: Sequence[Tensor], like: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """All outputs, by the ops' definitions. `inputs`: of the captured form, for both forms. like:
    outputs of the captured form; a serving graph gives the rows that they have, all by default.

    Raises BackendError when the weights have no data.
    """
    backend = ReferenceBackend()
    # The same numbers for random ops every time: a rewrite must not be blamed for them.
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if graph.dialect == "captured":
            return tuple(backend.lower(graph)(*inputs))
        executable = backend.lower_serving(graph, None, None)
        return (whole_prompt_logits(executable, inputs[0], like[0].shape if like else ()),)


def random_inputs(
    graph: Graph, seed: int = 0, *, first: int = 2, others: int = 11
) -> tuple[Tensor, ...]:
    """Inputs of a captured graph: ids within their tables, masks of zeros and ones that start with
    a one, normal floats; symbolic sizes are `first` on axis 0 and `others` elsewhere, or as near as
    the limits allow."""
    generator = torch.Generator().manual_seed(seed)
    sizes: dict[str, int] = {}
    made = []
    limits = size_limits(graph)
    for kind in input_types(graph):
        shape = []
        for axis, size in enumerate(kind.sizes):
            if isinstance(size, str) and size not in sizes:
                sizes[size] = fitting_size(limits, size, first if axis == 0 else others)
            shape.append(size if isinstance(size, int) else sizes[size])
        if kind.dtype.is_floating_point:
            made.append(torch.randn(shape, generator=generator).to(kind.dtype))
            continue
        tensor = torch.randint(0, kind.rows or 2, shape, generator=generator)
        if kind.rows is None and tensor.ndim > 1:
            tensor[:, :1] = 1
        made.append(tensor.to(kind.dtype))
    return tuple(made)


def fitting(graph: Graph, inputs: Any) -> tuple[Tensor, ...]:
    """`inputs` as a tuple. Raises RequestError when they are none of a captured graph."""
    names = [spec.name for spec in graph.inputs]
    is_sequence = isinstance(inputs, Sequence) and all(isinstance(x, Tensor) for x in inputs)
    if not is_sequence or len(inputs) != len(names):
        raise RequestError(f"inputs must be a list of one tensor for each of {names}")
    check_inputs(input_types(graph), inputs, size_limits(graph))
    check_assumptions(graph.assumptions, names, inputs)
    return tuple(inputs)


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of any output, relative to the largest value of that output.

    Infinite when the number of outputs or their shapes differ, and where one is nan or an infinity
    and the other is not the same.
    """
    if len(found) != len(expected):
        return float("inf")
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape:
            return float("inf")
        if not theirs.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(ours, theirs) else float("inf"))
            continue
        a, b = ours.double(), theirs.double()
        kinds = (Tensor.isnan, Tensor.isposinf, Tensor.isneginf)
        if not all(torch.equal(kind(a), kind(b)) for kind in kinds):
            return float("inf")
        a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
        if b.numel():
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)))
    return worst


def same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """True for equal outputs, nan in the same places, zeros of the same sign."""
    if len(found) != len(expected):
        return False
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return False
        if not theirs.is_floating_point():
            if not torch.equal(ours, theirs):
                return False
            continue
        holes = theirs.isnan()
        if not torch.equal(ours.isnan(), holes):
            return False
        a, b = ours.masked_fill(holes, 0), theirs.masked_fill(holes, 0)
        if not (torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())):
            return False
    return True
