"""Paged attention against dense float64 attention per request, and its batch invariance.

Every cache slot that no request owns (or that lies behind its context) holds NaN, so a result that
is finite has read nothing it should not.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import native_plan
import pytest
import torch
from native_plan import assert_gap_untouched, call, poisoned
from torch import Tensor

from graphopt.codegen.cpu import build
from graphopt.codegen.cpu.abi import NativeLibrary, Op


@pytest.fixture(autouse=True)
def _fresh_inputs(record_property: Callable[[str, object], None]) -> None:
    record_property("seed", torch.seed())


@dataclass(frozen=True)
class Heads:
    kv: int = 3
    group: int = 3
    key: int = 64
    value: int = 64


@dataclass(frozen=True)
class Mask:
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False


@dataclass(eq=False)
class Cache:
    """The contexts of several requests, dense and paged."""

    keys: list[Tensor]
    values: list[Tensor]
    k_cache: Tensor
    v_cache: Tensor
    tables: Tensor
    block_size: int

    @classmethod
    def random(cls, lengths: list[int], heads: Heads, dtype: torch.dtype, block_size: int) -> Cache:
        columns = max(-(-n // block_size) for n in lengths)
        owned = sum(-(-n // block_size) for n in lengths)
        order = torch.randperm(owned + 3).tolist()
        tables = torch.full((len(lengths), columns), 10**9)  # never to be read
        k_cache = torch.full((owned + 3, block_size, heads.kv, heads.key), float("nan"))
        v_cache = torch.full((owned + 3, block_size, heads.kv, heads.value), float("nan"))
        k_cache, v_cache = k_cache.to(dtype), v_cache.to(dtype)
        keys, values = [], []
        for request, length in enumerate(lengths):
            keys.append(torch.randn(length, heads.kv, heads.key).to(dtype))
            values.append(torch.randn(length, heads.kv, heads.value).to(dtype))
            for first in range(0, length, block_size):
                block = order.pop()
                tables[request, first // block_size] = block
                n = min(block_size, length - first)
                k_cache[block, :n] = keys[-1][first : first + n]
                v_cache[block, :n] = values[-1][first : first + n]
        return cls(keys, values, k_cache, v_cache, tables, block_size)


def attend(
    cache: Cache,
    q: list[Tensor],
    lengths: list[int],
    heads: Heads,
    mask: Mask,
    sinks: Tensor | None = None,
    threads: int = 2,
    requests: list[int] | None = None,
) -> list[Tensor]:
    """One step: q[i] are the last rows of the first lengths[i] tokens of request requests[i]."""
    chosen = list(range(len(q))) if requests is None else requests
    rows = torch.cat(q)
    out = poisoned(len(rows), heads.kv * heads.group, heads.value, dtype=rows.dtype)
    starts = torch.tensor([0, *(len(x) for x in q)]).cumsum(0)
    tables = cache.tables[chosen].contiguous()
    call(
        Op.OP_PAGED_ATTENTION,
        [out, rows, cache.k_cache, cache.v_cache, tables, starts, torch.tensor(lengths), sinks],
        [len(rows), heads.kv, heads.key, heads.value],
        [[out.stride(0), out.stride(1)], [rows.stride(0), rows.stride(1)]],
        [cache.block_size, heads.group, mask.window],
        [heads.key**-0.5, mask.softcap],
        threads,
        SYM_TOKENS=len(rows),
        SYM_REQUESTS=len(q),
        SYM_BLOCK_COLUMNS=tables.shape[1],
    )
    assert out.isfinite().all()
    assert_gap_untouched(out)
    return list(out.split([len(x) for x in q]))


def dense(
    q: Tensor, k: Tensor, v: Tensor, heads: Heads, mask: Mask, sinks: Tensor | None
) -> Tensor:
    """Float64 attention of the last len(q) tokens of one request; k, v its context."""
    k64, v64 = (x.double().repeat_interleave(heads.group, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.double(), k64) * heads.key**-0.5
    if mask.softcap:
        scores = mask.softcap * torch.tanh(scores / mask.softcap)
    own = torch.arange(len(k) - len(q), len(k))[:, None]
    place = torch.arange(len(k))[None]
    seen = place <= own
    if mask.window:
        seen &= place > own - mask.window
    scores = scores.masked_fill(~seen, -float("inf"))
    if sinks is not None:
        extra = sinks.double()[:, None, None].expand(-1, len(q), 1)
        weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v64)


def random_q(rows: int, heads: Heads, dtype: torch.dtype, scale: float = 2.0) -> Tensor:
    return (torch.randn(rows, heads.kv * heads.group, heads.key) * scale).to(dtype)


def check(
    rows: list[int],
    lengths: list[int],
    heads: Heads,
    mask: Mask,
    cache_dtype: torch.dtype,
    dtype: torch.dtype = torch.float32,
    block_size: int = 16,
    threads: int = 2,
) -> None:
    cache = Cache.random(lengths, heads, cache_dtype, block_size)
    sinks = torch.randn(heads.kv * heads.group) if mask.sinks else None
    q = [random_q(n, heads, dtype) for n in rows]
    got = attend(cache, q, lengths, heads, mask, sinks, threads)
    for request, out in enumerate(got):
        k, v = cache.keys[request], cache.values[request]
        expected = dense(q[request], k, v, heads, mask, sinks)
        tolerance = 1e-5 if dtype == torch.float32 else 4e-3
        bound = tolerance * (1 + expected.abs())
        difference = (out.double() - expected).abs()
        assert (difference <= bound).all(), f"request {request}: {difference.max().item()}"


STEPS = {
    "decode": ([1], [300]),
    "decode_first_token": ([1], [1]),
    "decode_long": ([1], [2049]),
    "prefill": ([70], [70]),
    "chunk": ([33], [600]),
    "mixed": ([1, 40, 1, 17, 5], [513, 40, 1, 273, 256]),
}


@pytest.mark.parametrize("step", list(STEPS))
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_against_dense(step: str, cache_dtype: torch.dtype, threads: int) -> None:
    check(*STEPS[step], Heads(), Mask(), cache_dtype, threads=threads)


@pytest.mark.parametrize(
    "heads",
    [
        Heads(kv=1, group=1, key=64, value=64),
        Heads(kv=2, group=7, key=128, value=128),
        Heads(kv=1, group=60, key=40, value=24),
        Heads(kv=2, group=2, key=192, value=128),
        Heads(kv=4, group=1, key=5, value=3),
        Heads(kv=1, group=2, key=256, value=272),
        Heads(kv=2, group=4, key=17, value=80),
    ],
    ids=str,
)
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16])
def test_head_shapes(heads: Heads, cache_dtype: torch.dtype) -> None:
    check(*STEPS["mixed"], heads, Mask(), cache_dtype)
    check(*STEPS["decode"], heads, Mask(), cache_dtype)


@pytest.mark.parametrize(
    "mask",
    [
        Mask(window=1),
        Mask(window=40),
        Mask(window=300),
        Mask(softcap=1.5),
        Mask(sinks=True),
        Mask(window=257, softcap=20.0, sinks=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("step", ["decode", "decode_long", "chunk", "mixed"])
def test_masks(mask: Mask, step: str) -> None:
    check(*STEPS[step], Heads(), mask, torch.float16)


@pytest.mark.parametrize("block_size", [1, 7, 16, 256, 300])
def test_block_sizes(block_size: int) -> None:
    check(*STEPS["mixed"], Heads(kv=2, group=2), Mask(), torch.float16, block_size=block_size)


@pytest.mark.parametrize("step", ["decode_long", "mixed"])
def test_bfloat16_activations(step: str) -> None:
    check(*STEPS[step], Heads(), Mask(), torch.bfloat16, dtype=torch.bfloat16)


def test_window_does_not_read_evicted_blocks() -> None:
    heads, mask, length = Heads(), Mask(window=64), 700
    cache = Cache.random([length], heads, torch.float32, 16)
    q = [random_q(1, heads, torch.float32)]
    expected = attend(cache, q, [length], heads, mask)[0]
    cache.tables[0, : (length - 64) // 16] = 10**9
    assert torch.equal(attend(cache, q, [length], heads, mask)[0], expected)


@pytest.mark.parametrize("heads", [Heads(), Heads(kv=1, group=1), Heads(kv=2, group=7, value=40)])
@pytest.mark.parametrize("mask", [Mask(), Mask(window=100), Mask(softcap=5.0, sinks=True)], ids=str)
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_batch_invariance(heads: Heads, mask: Mask, cache_dtype: torch.dtype) -> None:
    """The bits of a row do not depend on what it is computed with."""
    lengths = [600, 330, 90]
    cache = Cache.random(lengths, heads, cache_dtype, 16)
    sinks = torch.randn(heads.kv * heads.group) if mask.sinks else None
    q = [random_q(n, heads, torch.float32) for n in lengths]
    whole = attend(cache, q, lengths, heads, mask, sinks, threads=1)
    for threads in (2, 3, 5):
        again = attend(cache, q, lengths, heads, mask, sinks, threads)
        assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
    for request, length in enumerate(lengths):
        for position in [*torch.randint(0, length, (6,)).tolist(), 0, length - 1]:
            for threads in (1, 2):
                row = attend(
                    cache,
                    [q[request][position : position + 1]],
                    [position + 1],
                    heads,
                    mask,
                    sinks,
                    threads,
                    requests=[request],
                )[0]
                assert torch.equal(row[0], whole[request][position])
    for size in (1, 5, 64, 200):  # chunks, all three requests in one step
        for first in torch.randint(0, 90 - size, (2,)).tolist() if size < 90 else [0]:
            last = [min(first + size + 100 * (2 - i), n) for i, n in enumerate(lengths)]
            begin = [max(end - size, 0) for end in last]
            chunks = [x[b:e] for x, b, e in zip(q, begin, last, strict=True)]
            rows = attend(cache, chunks, last, heads, mask, sinks)
            for request, got in enumerate(rows):
                assert torch.equal(got, whole[request][begin[request] : last[request]])


def test_large_scores_do_not_overflow() -> None:
    heads = Heads(kv=1, group=2)
    cache = Cache.random([500], heads, torch.float32, 16)
    q = [random_q(3, heads, torch.float32, scale=300.0)]
    out = attend(cache, q, [500], heads, Mask())[0]
    expected = dense(q[0], cache.keys[0], cache.values[0], heads, Mask(), None)
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 instruction sets")
def test_portable_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without AVX2, FMA and F16C: same kernels, compiled without intrinsics."""
    flags = tuple(f if f != "-march=native" else "-march=x86-64" for f in build.FLAGS)
    monkeypatch.setattr(build, "FLAGS", flags)
    library = NativeLibrary(build.build_library(tmp_path))
    monkeypatch.setattr(native_plan, "load_library", lambda: library)
    for cache_dtype in (torch.float32, torch.float16, torch.bfloat16):
        check(*STEPS["mixed"], Heads(), Mask(window=257, softcap=9.0, sinks=True), cache_dtype)
        test_batch_invariance(Heads(), Mask(), cache_dtype)
