"""The references of the ops against their definitions, element by element in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.errors import ScoreRangeError
from graphopt.ir.opset import load_all
from graphopt.ops import attention, embedding_wq, kv_write, layer_norm, paged_attention, rms_norm
from graphopt.ops import rope as rope_op

B, H, G, S, T, D, E = 2, 4, 2, 3, 5, 8, 6


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _qkv(queries: int = S, keys: int = T) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _random(B, H, queries, D, seed=1),
        _random(B, G, keys, D, seed=2),
        _random(B, G, keys, E, seed=3),
    )


Score = Callable[[float, int, int, int, int], float]


def attended(q: Tensor, k: Tensor, v: Tensor, score: Score, sinks: Tensor | None = None) -> Tensor:
    """Softmax over `score(q . k, b, h, position, key)`, and the weighted sum of the values."""
    queries, keys = q.shape[2], k.shape[2]
    out = torch.zeros(B, H, queries, E, dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (B, H, queries))).tolist():
        group = h // (H // G)
        position = i + keys - queries
        found = [score(float(q[b, h, i] @ k[b, group, j]), b, h, position, j) for j in range(keys)]
        extra = [] if sinks is None else [float(sinks[h])]
        peak = max(found + extra)
        if peak == -math.inf:
            continue
        weights = [math.exp(x - peak) for x in found]
        total = sum(weights) + sum(math.exp(x - peak) for x in extra)
        out[b, h, i] = sum(w / total * v[b, group, j] for j, w in enumerate(weights))
    return out


PAD = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 1, 1, 1]]).bool()
MASK = _random(B, 1, S, T, seed=4)
SEEN = MASK > -0.5
TABLE = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 1, 1, 1]])
LOW = -math.inf


def only(visible: Callable[[int, int, int, int], Any]) -> Score:
    return lambda s, b, h, q, k: s if visible(b, h, q, k) else LOW


CASES: dict[str, tuple[dict[str, Any], Score]] = {
    "plain": ({}, lambda s, b, h, q, k: s),
    "causal": ({"causal": True}, only(lambda b, h, q, k: k <= q)),
    "window": ({"causal": True, "window": 2}, only(lambda b, h, q, k: q - 2 < k <= q)),
    "two-sided": ({"window": 2}, only(lambda b, h, q, k: q - 2 < k < q + 2)),
    "padding": ({"pad_BT": PAD}, only(lambda b, h, q, k: PAD[b, k])),
    "added": ({"mask": MASK}, lambda s, b, h, q, k: s + float(MASK[b, 0, q - 2, k])),
    "seen": ({"mask": SEEN}, only(lambda b, h, q, k: SEEN[b, 0, q - 2, k])),
    "one row": ({"mask": MASK[:, :, :1]}, lambda s, b, h, q, k: s + float(MASK[b, 0, 0, k])),
    "softcap": ({"softcap": 2.0}, lambda s, b, h, q, k: 2 * math.tanh(s / 2)),
    "predicate": (
        {"predicate": "aux0[b, k] == aux0[b, q]", "aux": [TABLE]},
        only(lambda b, h, q, k: TABLE[b, k] == TABLE[b, q]),
    ),
    "bias": (
        {"bias": "float(k - q) * 0.25 + float(h)"},
        lambda s, b, h, q, k: s + (k - q) * 0.25 + h,
    ),
    "filled": (
        {"causal": True, "hidden": "-2.0"},
        lambda s, b, h, q, k: s if k <= q else -2.0,
    ),
    "moved": (
        {"causal": True, "hidden": "s + -2.0"},
        lambda s, b, h, q, k: s if k <= q else s - 2.0,
    ),
    "moved beside a mask": (
        {"causal": True, "hidden": "s - (mask + 1.0)", "mask": MASK},
        lambda s, b, h, q, k: (
            s + float(MASK[b, 0, q - 2, k]) if k <= q else s - float(MASK[b, 0, q - 2, k]) - 1
        ),
    ),
    "halved": (
        {"causal": True, "hidden": "s * 0.5"},
        lambda s, b, h, q, k: s if k <= q else s / 2,
    ),
    "halved beside a mask": (
        {"causal": True, "hidden": "s * 0.5 + mask", "mask": MASK},
        lambda s, b, h, q, k: (s if k <= q else s / 2) + float(MASK[b, 0, q - 2, k]),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, score = CASES[name]
    q, k, v = _qkv()
    wanted = attended(q * 0.5, k, v, score)
    for block in (256, 2, 1):
        monkeypatch.setattr(attention, "BLOCK", block)
        found = attention.reference(q, k, v, scale=0.5, **given)
        torch.testing.assert_close(found, wanted)


def test_attention_with_sinks() -> None:
    q, k, v = _qkv()
    sinks = torch.tensor([0.5, -1.0, 9.0, 0.0], dtype=torch.float64)
    wanted = attended(q, k, v, CASES["causal"][1], sinks)
    found = attention.reference(q, k, v, sinks_H=sinks, scale=1.0, causal=True)
    torch.testing.assert_close(found, wanted)


def test_a_query_that_sees_nothing() -> None:
    """More queries than keys: the first see none."""
    q, k, v = _qkv(queries=4, keys=2)
    found = attention.reference(q, k, v, scale=1.0, causal=True)
    assert torch.equal(found[:, :, :2], torch.zeros(B, H, 2, E, dtype=torch.float64))
    assert found[:, :, 2:].isfinite().all()
    empty = attention.reference(q, k, v, scale=1.0, causal=True, empty_is_nan=True)
    assert empty[:, :, :2].isnan().all()
    torch.testing.assert_close(empty[:, :, 2:], found[:, :, 2:])
    alike = attention.reference(q, k, v, scale=1.0, causal=True, hidden="-7.0")
    mean = v.mean(2).repeat_interleave(H // G, 1)
    torch.testing.assert_close(alike[:, :, 0], mean)


def turned(x: Tensor, angles: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    """Columns turned pair by pair. angles: `[S, pairs]`"""
    y = x.clone()
    for n, (a, b) in enumerate(pairs):
        cos, sin = angles[:, n].cos(), angles[:, n].sin()
        y[..., a] = x[..., a] * cos - x[..., b] * sin
        y[..., b] = x[..., b] * cos + x[..., a] * sin
    return y


@pytest.mark.parametrize("half_tables", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [4, 8])
def test_rope(interleaved: bool, half_tables: bool, width: int) -> None:
    x, angles = _random(B, H, S, 8), _random(S, width // 2)
    half = range(width // 2)
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + width // 2) for i in half]
    wide = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    table = (angles if half_tables else wide)[None]
    found = rope_op.reference(
        x, table.cos(), table.sin(), interleaved=interleaved, half_tables=half_tables
    )
    torch.testing.assert_close(found, turned(x, angles, pairs))


@pytest.mark.parametrize("cast_first", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(cast_first: bool, offset: float) -> None:
    x, w = _random(3, 8).bfloat16(), _random(8).bfloat16()
    wide = x.float()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    if cast_first:
        wanted = normed.bfloat16() * (w + offset if offset else w)
    else:
        wanted = (normed * (w.float() + offset)).bfloat16()
    found = rms_norm.reference(x, w, eps=1e-3, weight_offset=offset, cast_first=cast_first)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(rms_norm.reference(x, eps=1e-3), normed.bfloat16())


def test_rms_norm_adds_its_offset_where_the_model_does() -> None:
    """In the weight's own type when the cast comes first, in float32 otherwise."""
    w = torch.tensor([2**-9, 0.5]).bfloat16()
    x = torch.tensor([[1.0, 1.0]]).bfloat16()
    first = rms_norm.reference(x, w, eps=0.0, weight_offset=1.0, cast_first=True)
    assert first.tolist() == [[1.0, 1.5]]
    later = rms_norm.reference(x.float(), w, eps=0.0, weight_offset=1.0, cast_first=False)
    torch.testing.assert_close(later, torch.tensor([[1 + 2**-9, 1.5]]))


def test_layer_norm() -> None:
    x, w, b = _random(3, 8), _random(8, seed=1), _random(8, seed=2)
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(layer_norm.reference(x, w, b, eps=0.1), normed * w + b)
    torch.testing.assert_close(layer_norm.reference(x, None, b, eps=0.1), normed + b)
    torch.testing.assert_close(layer_norm.reference(x, eps=0.1), normed)


def test_kv_write() -> None:
    keys, values = torch.zeros(3, 2, G, D), torch.zeros(3, 2, G, E)
    k, v = _random(1, G, 3, D).float(), _random(1, G, 3, E, seed=1).float()
    kv_write.reference(keys, values, k, v, torch.tensor([5, 0, 3]))
    for row, slot in enumerate((5, 0, 3)):
        block, at = divmod(slot, 2)
        assert torch.equal(keys[block, at], k[0, :, row])
        assert torch.equal(values[block, at], v[0, :, row])
    assert keys.flatten(0, 1)[[1, 2, 4]].abs().sum() == 0


def _paged(**options: Any) -> tuple[Tensor, list[Tensor]]:
    """(the op on two requests of three and one rows, each request by the dense op)."""
    storage = [_random(6, 2, G, width, seed=width) for width in (D, E)]
    tables = torch.tensor([[4, 1, 3], [0, 5, 2]])
    q = _random(1, H, 4, D, seed=9)
    starts, lengths = torch.tensor([0, 3, 4]), torch.tensor([5, 4])
    found = paged_attention.reference(q, *storage, tables, starts, lengths, scale=0.3, **options)
    apart = []
    for request, length in enumerate((5, 4)):
        places = [(tables[request, p // 2], p % 2) for p in range(length)]
        k, v = (torch.stack([s[block, at] for block, at in places], 1)[None] for s in storage)
        rows = q[:, :, (0, 3)[request] : (3, 4)[request]]
        dense = {n: options[n] for n in ("window", "softcap", "sinks_H") if n in options}
        apart.append(attention.reference(rows, k, v, scale=0.3, causal=True, **dense))
    return found, apart


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 2}, {"softcap": 1.5}, {"sinks_H": torch.tensor([0.1, 2.0, -1.0, 0.0])}],
)
def test_paged_attention(options: dict[str, Any]) -> None:
    found, apart = _paged(**options)
    torch.testing.assert_close(found, torch.cat(apart, 2))


def test_rows_whose_highest_score_is_out_of_bounds_are_refused() -> None:
    found, apart = _paged(least_peak=-50.0, most_peak=50.0)
    torch.testing.assert_close(found, torch.cat(apart, 2))
    for bounds in ((-50.0, -40.0), (40.0, 50.0)):
        with pytest.raises(ScoreRangeError, match="highest score"):
            _paged(least_peak=bounds[0], most_peak=bounds[1])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_low_bit_embedding(bits: int, zeros: bool) -> None:
    codes = torch.randint(0, 16, (5, 8), generator=torch.Generator().manual_seed(0))
    packed = codes.to(torch.int8)
    if bits == 4:
        packed = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    scale, zero = torch.rand(5, 2) + 0.5, torch.rand(5, 2)
    ids = torch.tensor([[4, 0, 4], [1, 2, 3]])
    given = {"bits": bits, "group": 4, "offset": 3, "dtype": torch.float32}
    found = embedding_wq.reference(ids, packed, scale, zero if zeros else None, **given)
    dense = (codes - 3).float().view(5, 2, 4) * scale[..., None]
    if zeros:
        dense = dense + zero[..., None]
    torch.testing.assert_close(found, dense.view(5, 8)[ids])
    fake = embedding_wq.fake(ids, packed, scale, **given)
    assert (fake.shape, fake.dtype) == (found.shape, found.dtype)


@pytest.mark.parametrize("name", ["kv_write", "paged_attention"])
def test_the_numbers_that_kernels_follow_are_step_inputs(name: str) -> None:
    wanted = {
        "kv_write": {"slots_T": "slots"},
        "paged_attention": {n: n for n in ("block_tables", "query_start", "kv_lens")},
    }
    spec = load_all()[f"graphopt.{name}"]
    assert spec.step_inputs == wanted[name]
    assert spec.mutates == (("k_cache", "v_cache") if name == "kv_write" else ())


FAKES: dict[str, tuple[Any, ...]] = {
    "attention": (*_qkv(),),
    "rope": (_random(B, H, S, 8), _random(1, S, 8).float(), _random(1, S, 8).float()),
    "rms_norm": (_random(3, 8),),
    "layer_norm": (_random(3, 8),),
    "swiglu": (_random(3, 8), _random(3, 8)),
    "geglu": (_random(3, 8), _random(3, 8)),
}


@pytest.mark.parametrize("name", FAKES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fakes_have_the_shape_and_dtype_of_results(name: str, dtype: torch.dtype) -> None:
    spec = load_all()[f"graphopt.{name}"]
    args = [a.to(dtype) if i == 0 or name != "rope" else a for i, a in enumerate(FAKES[name])]
    named = {"scale": 1.0} if name == "attention" else {"eps": 1e-5} if "norm" in name else {}
    found, fake = spec.reference(*args, **named), spec.fake(*args, **named)
    assert (fake.shape, fake.dtype) == (found.shape, found.dtype)
    assert fake.is_contiguous()
    assert found.is_contiguous()


F32 = 4
COSTS: dict[str, tuple[tuple[Any, ...], dict[str, Any], float, float]] = {
    # operands, attributes, operations, bytes
    "swiglu": ((torch.ones(3, 8),) * 2, {}, 6 * 24, F32 * 3 * 24),
    "geglu": ((torch.ones(3, 8),) * 2, {}, 10 * 24, F32 * 3 * 24),
    "rms_norm": ((torch.ones(3, 8), torch.ones(8)), {"eps": 0.1}, 4 * 24, F32 * (48 + 8)),
    "layer_norm": ((torch.ones(3, 8),) + (torch.ones(8),) * 2, {"eps": 0.1}, 7 * 24, F32 * 64),
    "rope": (
        (torch.ones(2, 4, 3, 8), torch.ones(1, 3, 8), torch.ones(1, 3, 8)),
        {},
        3 * 192,
        F32 * (2 * 192 + 48),
    ),
    "kv_write": (
        (
            *(torch.ones(5, 2, 3, 8), torch.ones(5, 2, 3, 6)),
            *(torch.ones(1, 3, 4, 8), torch.ones(1, 3, 4, 6), torch.zeros(4, dtype=torch.int64)),
        ),
        {},
        0,
        F32 * 2 * (96 + 72),
    ),
    # 4 heads, 3 queries, 5 keys, 8 + 6 columns; half of it when causal.
    "attention": (
        (torch.ones(2, 4, 3, 8), torch.ones(2, 2, 5, 8), torch.ones(2, 2, 5, 6)),
        {"scale": 1.0},
        2 * 2 * 4 * 15 * 14,
        F32 * (192 + 160 + 120 + 144),
    ),
    "attention causal": (
        (torch.ones(2, 4, 3, 8), torch.ones(2, 2, 5, 8), torch.ones(2, 2, 5, 6)),
        {"scale": 1.0, "causal": True},
        2 * 4 * 15 * 14,
        F32 * (192 + 160 + 120 + 144),
    ),
    # 2 requests of up to 3 blocks of 2 keys, of 2 heads.
    "paged_attention": (
        (
            *(torch.ones(1, 4, 7, 8), torch.ones(9, 2, 2, 8), torch.ones(9, 2, 2, 6)),
            *(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3), torch.zeros(2)),
        ),
        {"scale": 1.0},
        2 * 4 * 7 * 6 * 14,
        F32 * (2 * 224 + 2 * 6 * 2 * 14),
    ),
    # 6 ids of 16 columns: 8 bytes of codes, 2 scales of 2 bytes.
    "embedding_wq": (
        (
            torch.zeros(2, 3, dtype=torch.int64),
            torch.zeros(5, 8, dtype=torch.uint8),
            torch.ones(5, 2).half(),
        ),
        {"bits": 4, "group": 8, "offset": 8, "dtype": torch.float32},
        2 * 6 * 16,
        6 * (8 + 4 + 16 * F32),
    ),
    "linear_wq": (
        (torch.ones(3, 16), torch.zeros(5, 8, dtype=torch.uint8), torch.ones(5, 2).half()),
        {"bits": 4, "group": 8, "offset": 8, "activation": "float"},
        2 * 3 * 16 * 5,
        F32 * 48 + 40 + 20 + F32 * 15,
    ),
}


@pytest.mark.parametrize("name", COSTS)
def test_costs(name: str) -> None:
    args, named, flops, moved = COSTS[name]
    spec = load_all()[f"graphopt.{name.split()[0]}"]
    found = spec.cost(*args, **named)
    assert (found.flops, found.bytes) == (flops, moved)


def test_every_op_of_ours_has_a_cost_by_hand() -> None:
    ours = {name.removeprefix("graphopt.") for name in load_all() if name.startswith("graphopt.")}
    assert ours == {name.split()[0] for name in COSTS}
