"""graphopt::paged_attention: causal attention of many requests' token rows over the paged cache.

Rows of request r are `query_start[r] .. query_start[r+1]`; its context is `kv_lens[r]` tokens long,
these rows included and already written, and lies in blocks `block_tables[r]`. Row i of it has
position `kv_lens[r] - rows + i` and sees keys at its own position or before (within `window`).

A model that hides keys by -10000 hides them only beside scores that are not as low: the highest
score of every row must lie between `least_peak` and `most_peak` (both 0: anywhere).
Source: vLLM's PagedAttention (Kwon et al. 2023, arXiv 2309.06180).
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.errors import ScoreRangeError
from graphopt.ir.opset import Cost, define, nbytes
from graphopt.ops import attention, operands

SCHEMA = (
    "paged_attention(Tensor q_BHTD, Tensor k_cache, Tensor v_cache, Tensor block_tables, "
    "Tensor query_start, Tensor kv_lens, Tensor? sinks_H=None, *, float scale, int window=0, "
    "float softcap=0.0, float least_peak=0.0, float most_peak=0.0) -> Tensor"
)


def reference(
    q_BHTD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    kv_lens: Tensor,
    sinks_H: Tensor | None = None,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    least_peak: float = 0.0,
    most_peak: float = 0.0,
) -> Tensor:
    """Gather each request's context and call the dense reference.

    Raises RequestError for a row whose highest score lies outside its bounds.
    """
    heads, rows = q_BHTD.shape[1], q_BHTD.shape[2]
    out_BHTE = q_BHTD.new_empty((1, heads, rows, v_cache.shape[-1]))
    starts, lengths = query_start.tolist(), kv_lens.tolist()
    for request, length in enumerate(lengths):
        first, last = starts[request], starts[request + 1]
        k_1GTD, v_1GTE = (
            storage[block_tables[request]].flatten(0, 1)[:length].transpose(0, 1)[None]
            for storage in (k_cache, v_cache)
        )
        if least_peak < most_peak and last > first:
            k_1HTD = k_1GTD.to(torch.float32).repeat_interleave(heads // k_1GTD.shape[1], 1)
            found = attention.scores(q_BHTD[:, :, first:last], k_1HTD, scale, softcap)
            sizes = (1, heads, last - first, length)
            masks = attention.Masks(sizes, None, None, (), True, window, "", "", "")
            peak = masks.applied(found, range(last - first)).amax(-1)
            if bool(((peak < least_peak) | (peak > most_peak)).any()):
                raise ScoreRangeError(peak_error(least_peak, most_peak))
        out_BHTE[:, :, first:last] = attention.reference(
            q_BHTD[:, :, first:last],
            k_1GTD,
            v_1GTE,
            sinks_H=sinks_H,
            scale=scale,
            causal=True,
            window=window,
            softcap=softcap,
        )
    return out_BHTE


def peak_error(least_peak: float, most_peak: float) -> str:
    """What a row whose highest score lies outside its bounds is told."""
    return (
        f"a query's highest score lies outside {least_peak:g}..{most_peak:g}: beside it the number "
        "by which this model hides later tokens does not hide them, so their keys would be needed; "
        "compile with serving='off' to run the model as it is"
    )


def fake(
    q_BHTD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    kv_lens: Tensor,
    sinks_H: Tensor | None = None,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    least_peak: float = 0.0,
    most_peak: float = 0.0,
) -> Tensor:
    """Result `[1, H, T, E]` in the query's dtype."""
    operands.floats(q_BHTD=q_BHTD, k_cache=k_cache, v_cache=v_cache, sinks_H=sinks_H)
    operands.integers(block_tables=block_tables, query_start=query_start, kv_lens=kv_lens)
    operands.rank("k_cache", k_cache, 4)
    blocks, block_size, groups, width = k_cache.shape
    operands.sizes("q_BHTD", q_BHTD, 1, None, None, width)
    operands.sizes("v_cache", v_cache, blocks, block_size, groups, None)
    operands.sizes("block_tables", block_tables, kv_lens.shape[0], None)
    operands.rank("query_start", query_start, 1)
    operands.rank("kv_lens", kv_lens, 1)
    b, h, t, _d = q_BHTD.shape
    attention.check_groups(h, groups)
    if sinks_H is not None:
        operands.sizes("sinks_H", sinks_H, h)
    operands.finite(scale=scale, softcap=softcap)
    operands.least(0, window=window, softcap=softcap)
    return q_BHTD.new_empty((b, h, t, v_cache.shape[-1]))


def cost(
    q_BHTD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    *_: object,
    **__: object,
) -> Cost:
    """An upper bound from the block table: every row against every block listed."""
    _b, h, t, d = q_BHTD.shape
    requests, columns = block_tables.shape
    block_size, kv_heads = k_cache.shape[1], k_cache.shape[2]
    context = columns * block_size
    e = v_cache.shape[-1]
    kv_bytes = requests * context * kv_heads * (d + e) * k_cache.element_size()
    return Cost(2.0 * h * t * context * (d + e), nbytes(q_BHTD) * 2.0 + kv_bytes)


SPEC = define(
    SCHEMA,
    reference=reference,
    fake=fake,
    cost=cost,
    step_inputs={name: name for name in ("block_tables", "query_start", "kv_lens")},
)
