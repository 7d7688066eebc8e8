"""Row and element kernels of the native library against float64 formulas.

Inputs are strided views, outputs are NaN-filled before and their gaps checked after.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from native_plan import (
    assert_close,
    assert_gap_untouched,
    call,
    execute,
    instruction,
    poisoned,
    strided_randn,
)
from torch import Tensor
from torch.nn import functional as F

from graphopt.codegen.cpu.abi import (
    BinaryKind,
    GluKind,
    NormCast,
    Op,
    RopeStyle,
    Sym,
    UnaryKind,
)
from graphopt.errors import BackendError

FLOATS = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _fresh_inputs(record_property: Callable[[str, object], None]) -> None:
    record_property("seed", torch.seed())


def row_head(t: Tensor) -> list[int]:
    return [t.stride(0), t.stride(1)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("rows", "heads", "width"), [(1, 1, 576), (7, 3, 65), (5, 1, 1), (4, 2, 33)]
)
def test_rms_norm(dtype: torch.dtype, threads: int, rows: int, heads: int, width: int) -> None:
    x = strided_randn(rows, heads, width, dtype=dtype)
    weight = torch.randn(width, dtype=dtype)
    out = poisoned(rows, heads, width, dtype=dtype)
    strides = [row_head(out), row_head(x)]
    normed = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5)
    cases: list[tuple[NormCast, float, Tensor | None, Tensor]] = [
        (NormCast.ROUND_FIRST, 0.0, weight, normed.to(dtype).double() * weight.double()),
        (NormCast.ROUND_LAST, 1.0, weight, normed * (weight.double() + 1)),
        (NormCast.ROUND_LAST, 0.0, None, normed),
    ]
    for cast, added, w, expected in cases:
        out.fill_(float("nan"))
        call(
            Op.OP_RMS_NORM,
            [out, x, w],
            [rows, heads, width],
            strides,
            [cast],
            [1e-5, added],
            threads,
        )
        assert_close(out, expected)
        assert_gap_untouched(out)


def test_rms_norm_rounds_in_the_order_of_the_models() -> None:
    x = torch.randn(64, 1, 256, dtype=torch.bfloat16)
    weight = torch.randn(256, dtype=torch.bfloat16)
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    llama = weight * wide.to(torch.bfloat16)
    gemma = (wide * (1.0 + weight.float())).to(torch.bfloat16)
    for cast, added, expected in ((0, 0.0, llama), (1, 1.0, gemma)):
        out = torch.full_like(x, float("nan"))
        call(Op.OP_RMS_NORM, [out, x, weight], [64, 1, 256], [[256, 0]] * 2, [cast], [1e-6, added])
        # The mean's summation order may turn a rounding, in a handful of elements.
        assert (out != expected).sum() <= 16


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "heads", "width"), [(1, 1, 768), (6, 2, 37)])
def test_layer_norm(dtype: torch.dtype, rows: int, heads: int, width: int) -> None:
    x = strided_randn(rows, heads, width, dtype=dtype) + 3.0
    weight, bias = torch.randn(2, width, dtype=dtype).unbind()
    for w, b in ((weight, bias), (weight, None), (None, None)):
        out = poisoned(rows, heads, width, dtype=dtype)
        call(
            Op.OP_LAYER_NORM,
            [out, x, w, b],
            [rows, heads, width],
            [row_head(out), row_head(x)],
            attrs_f=[1e-5],
        )
        expected = F.layer_norm(
            x.double(),
            (width,),
            None if w is None else w.double(),
            None if b is None else b.double(),
            1e-5,
        )
        assert_close(out, expected, ulps=8)
        assert_gap_untouched(out)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("style", list(RopeStyle))
@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize(("width", "rotary"), [(64, 64), (80, 32), (10, 6)])
def test_rope(dtype: torch.dtype, style: RopeStyle, width: int, rotary: int, halved: bool) -> None:
    rows, heads = 7, 3
    x = strided_randn(rows, heads, width, dtype=dtype)
    pair_angle = angle = torch.randn(rows, rotary // 2) * 100
    angle = (
        torch.cat([angle, angle], -1)
        if style == RopeStyle.ROTATE_HALF
        else angle.repeat_interleave(2, -1)
    )
    cos, sin = angle.cos(), angle.sin()
    part = x[..., :rotary].double()
    if style == RopeStyle.ROTATE_HALF:
        turned = torch.cat([-part[..., rotary // 2 :], part[..., : rotary // 2]], -1)
    else:
        turned = torch.stack([-part[..., 1::2], part[..., ::2]], -1).flatten(-2)
    expected = part * cos.double()[:, None] + turned * sin.double()[:, None]
    expected = torch.cat([expected, x[..., rotary:].double()], -1)
    out = poisoned(rows, heads, width, dtype=dtype)
    dims = [rows, heads, width, rotary]
    if halved:
        cos, sin = pair_angle.cos(), pair_angle.sin()
    angles, attrs = [[cos.shape[1]], [sin.shape[1]]], [style, int(halved)]
    call(Op.OP_ROPE, [out, x, cos, sin], dims, [row_head(out), row_head(x), *angles], attrs)
    assert_close(out, expected)
    assert_gap_untouched(out)
    call(Op.OP_ROPE, [x, x, cos, sin], dims, [row_head(x), row_head(x), *angles], attrs)
    assert torch.equal(x, out)  # in place


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", FLOATS)
def test_kv_write(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    rows, heads, key_width, value_width, blocks, block_size = 9, 2, 20, 12, 5, 4
    k = strided_randn(rows, heads, key_width, dtype=dtype)
    v = strided_randn(rows, heads, value_width, dtype=dtype)
    k_cache = torch.full((blocks, block_size, heads, key_width), float("nan"), dtype=cache_dtype)
    v_cache = torch.full((blocks, block_size, heads, value_width), float("nan"), dtype=cache_dtype)
    slots = torch.randperm(blocks * block_size)[:rows]
    slots[4] = -1
    call(
        Op.OP_KV_WRITE,
        [k_cache, v_cache, k, v, slots],
        [rows, heads, key_width, value_width],
        [[], [], row_head(k), row_head(v)],
        [block_size, blocks],
    )
    for cache, fresh in ((k_cache, k), (v_cache, v)):
        expected = torch.full_like(cache, float("nan")).flatten(0, 1)
        kept = slots >= 0
        expected[slots[kept]] = fresh[kept].to(cache_dtype)
        assert torch.equal(cache.flatten(0, 1).nan_to_num(1e4), expected.nan_to_num(1e4))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", list(GluKind)[:-1])
@pytest.mark.parametrize(("rows", "width"), [(1, 1536), (5, 259), (3, 7)])
def test_glu(dtype: torch.dtype, kind: GluKind, rows: int, width: int) -> None:
    act: dict[GluKind, Callable[[Tensor], Tensor]] = {
        GluKind.GLU_SILU: F.silu,
        GluKind.GLU_GELU: F.gelu,
        GluKind.GLU_GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    }
    gate = strided_randn(rows, width, dtype=dtype, scale=3)
    up = strided_randn(rows, width, dtype=dtype)
    out = poisoned(rows, width, dtype=dtype)
    strides = [[out.stride(0)], [gate.stride(0)], [up.stride(0)]]
    call(Op.OP_GLU, [out, gate, up], [rows, width], strides, [kind])
    assert_close(out, act[kind](gate.double()) * up.double())
    assert_gap_untouched(out)


BINARY: dict[BinaryKind, Callable[[Tensor, Tensor], Tensor]] = {
    BinaryKind.BINARY_ADD: torch.add,
    BinaryKind.BINARY_SUB: torch.sub,
    BinaryKind.BINARY_MUL: torch.mul,
    BinaryKind.BINARY_DIV: torch.div,
    BinaryKind.BINARY_MAX: torch.maximum,
    BinaryKind.BINARY_MIN: torch.minimum,
}


@pytest.mark.parametrize("kind", list(BINARY))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["contiguous", "rows", "transposed", "broadcast", "scalar"])
def test_binary(kind: BinaryKind, dtype: torch.dtype, layout: str) -> None:
    shape = (2, 3, 5, 261)
    a = torch.randn(shape).to(dtype)
    b = torch.randn(shape).to(dtype)
    out = torch.full(shape, float("nan"), dtype=dtype)
    if layout == "rows":
        a, out = strided_randn(*shape, dtype=dtype), poisoned(*shape, dtype=dtype)
    elif layout == "transposed":
        a = torch.randn(shape[::-1]).to(dtype).permute(3, 2, 1, 0)
        out = torch.full((3, 2, 261, 5), float("nan"), dtype=dtype).permute(1, 0, 3, 2)
    elif layout == "broadcast":
        b = torch.randn(3, 1, 261).to(dtype).expand(shape)
    scalar = layout == "scalar"
    call(
        Op.OP_BINARY,
        [out, a, None if scalar else b],
        shape,
        [out.stride(), a.stride(), b.stride()],
        [kind],
        [0.7],
    )
    right = torch.tensor(0.7).double() if scalar else b.double()
    expected = BINARY[kind](a.double(), right)
    assert torch.equal(out, expected.to(dtype)) or dtype == torch.float32
    assert_close(out, expected, ulps=1)
    if layout == "rows":
        assert_gap_untouched(out)


def test_binary_promotes_and_keeps_nan() -> None:
    a = torch.randn(1, 1, 3, 40).to(torch.bfloat16)
    b = torch.randn(1, 1, 3, 40)
    b[0, 0, 1, 3] = float("nan")
    out = torch.zeros(1, 1, 3, 40)
    strides = [out.stride(), a.stride(), b.stride()]
    for kind, f in ((BinaryKind.BINARY_ADD, torch.add), (BinaryKind.BINARY_MAX, torch.maximum)):
        call(Op.OP_BINARY, [out, a, b], out.shape, strides, [kind])
        assert torch.equal(out.nan_to_num(9.0), f(a.float(), b).nan_to_num(9.0))


def gelu(x64: Tensor) -> Tensor:
    """x Phi(x) without torch's cancellation in 1 + erf."""
    return 0.5 * x64 * torch.special.erfc(-x64 / 2**0.5)


def gelu_tanh(x64: Tensor) -> Tensor:
    """0.5 x (1 + tanh(u)) = x sigmoid(2u), which does not cancel."""
    return x64 * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x64 + 0.044715 * x64**3))


UNARY: dict[UnaryKind, Callable[[Tensor], Tensor]] = {
    UnaryKind.UNARY_COPY: lambda x: x,
    UnaryKind.UNARY_NEG: torch.neg,
    UnaryKind.UNARY_EXP: torch.exp,
    UnaryKind.UNARY_RSQRT: torch.rsqrt,
    UnaryKind.UNARY_SQRT: torch.sqrt,
    UnaryKind.UNARY_SIGMOID: torch.sigmoid,
    UnaryKind.UNARY_SILU: F.silu,
    UnaryKind.UNARY_GELU: gelu,
    UnaryKind.UNARY_GELU_TANH: gelu_tanh,
    UnaryKind.UNARY_TANH: torch.tanh,
    UnaryKind.UNARY_RELU: torch.relu,
    UnaryKind.UNARY_COS: torch.cos,
    UnaryKind.UNARY_SIN: torch.sin,
    UnaryKind.UNARY_RECIPROCAL: torch.reciprocal,
    UnaryKind.UNARY_SQUARE: torch.square,
}


@pytest.mark.parametrize("kind", list(UNARY))
@pytest.mark.parametrize("dtype", FLOATS)
def test_unary(kind: UnaryKind, dtype: torch.dtype) -> None:
    shape = (2, 1, 7, 263)
    x = strided_randn(*shape, dtype=dtype, scale=4)
    if kind in {UnaryKind.UNARY_RSQRT, UnaryKind.UNARY_SQRT}:
        x.abs_().clamp_min_(1e-3)
    if kind in {UnaryKind.UNARY_COS, UnaryKind.UNARY_SIN}:
        x.mul_(2.5e4)
    for source in (x, x.permute(1, 0, 3, 2)):
        out = poisoned(*source.shape, dtype=dtype)
        strides = [out.stride(), source.stride()]
        call(Op.OP_UNARY, [out, source], source.shape, strides, [kind])
        eps = torch.finfo(dtype).eps
        expected = UNARY[kind](source.double())
        # Relative, also for tiny results; below 1e-37 the exponentials overflow.
        error = (out.double() - expected).abs()
        bound = 4 * eps * expected.abs() + 1e-37
        if kind in {UnaryKind.UNARY_GELU, UnaryKind.UNARY_GELU_TANH}:
            # exp(-a) is as exact as a is: a few fp32 ulp of a, up to 88.
            bound += 6e-5 * expected.abs() * (source < -1)
        assert (error <= bound).all(), (error / bound).max()
        assert_gap_untouched(out)


def test_elementary_functions_on_extremes() -> None:
    x = torch.tensor([0.0, -0.0, 1e-30, -88, -100, -104, -200, 88.7, 89, 1e30, -1e30])
    x = torch.cat([x, torch.tensor([float("inf"), -float("inf"), float("nan")])])
    kinds = ["EXP", "SIGMOID", "SILU", "GELU", "GELU_TANH", "TANH", "RELU", "SQUARE", "COPY"]
    for name in kinds:
        kind = UnaryKind[f"UNARY_{name}"]
        out = torch.empty_like(x)
        call(Op.OP_UNARY, [out, x], [1, 1, 1, len(x)], [[0, 0, 0, 1]] * 2, [kind])
        expected = UNARY[kind](x.double()).float()
        if name in {"SILU", "GELU", "GELU_TANH"}:  # -inf * 0 in the formulas
            expected[-2] = out[-2]
            assert out[-2].isnan() or out[-2] == 0
        torch.testing.assert_close(out, expected, rtol=4e-5, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("source", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.int8])
@pytest.mark.parametrize("target", [torch.int64, torch.int32, torch.float32, torch.bool])
def test_copy_of_integers(source: torch.dtype, target: torch.dtype) -> None:
    x = torch.randint(0, 100, (3, 41)).to(source).t()
    out = torch.zeros(41, 3, dtype=target)
    call(Op.OP_UNARY, [out, x], [1, 1, 41, 3], [[0, 0, *out.stride()], [0, 0, *x.stride()]], [0])
    assert torch.equal(out, x.to(target))


def test_copy_of_large_integers_is_exact() -> None:
    x = torch.tensor([2**40 + 1, -(2**62) + 3])
    out = torch.zeros_like(x)
    call(Op.OP_UNARY, [out, x], [1, 1, 1, 2], [[0, 0, 0, 1]] * 2, [0])
    assert torch.equal(out, x)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.int64, torch.int64)])
def test_gather_rows(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    to, source = dtypes
    x = (torch.randn(11, 37) * 50).to(source)
    indices = torch.randint(0, 11, (6,))
    out = torch.zeros(6, 40, dtype=to)
    call(Op.OP_GATHER_ROWS, [out, x, indices], [6, 37, 11], [[40], [37]])
    assert torch.equal(out[:, :37], x[indices].to(to))
    assert (out[:, 37:] == 0).all()


@pytest.mark.parametrize("index", [-1, 11, 2**40])
def test_gather_rows_stays_inside_its_table(index: int) -> None:
    x, out = torch.randn(11, 4), torch.zeros(3, 4)
    indices = torch.tensor([2, index, 5])
    with pytest.raises(BackendError, match="looks up a row that its table does not have"):
        call(Op.OP_GATHER_ROWS, [out, x, indices], [3, 4, 11], [[4], [4]])


@pytest.mark.parametrize("slot", [20, 10**9])
def test_kv_write_stays_inside_the_cache(slot: int) -> None:
    k, v = torch.randn(2, 1, 4), torch.randn(2, 1, 4)
    k_cache, v_cache = torch.zeros(5, 4, 1, 4), torch.zeros(5, 4, 1, 4)
    with pytest.raises(BackendError, match="OP_KV_WRITE"):
        call(
            Op.OP_KV_WRITE,
            [k_cache, v_cache, k, v, torch.tensor([0, slot])],
            [2, 1, 4, 4],
            [[], [], row_head(k), row_head(v)],
            [4, 5],
            threads=1,
        )
    assert torch.equal(k_cache[0, 0], k[0])


def test_extents_and_addresses_scale_with_the_step() -> None:
    """One plan for every batch: extents from syms, views that move with the number of tokens."""
    arena = torch.full((4 * 100,), float("nan"))
    for tokens in (1, 7):
        x = torch.randn(tokens, 10)
        arena.fill_(float("nan"))
        instr, bases = instruction(
            Op.OP_UNARY, [arena, x], [1, 1, 1, 10], [[0, 0, 10, 1]] * 2, [UnaryKind.UNARY_NEG]
        )
        instr.dims[2].sym = Sym.SYM_TOKENS
        instr.operands[0].offset, instr.operands[0].offset_per_token = 16, 40
        execute([instr], bases, SYM_TOKENS=tokens)
        start = 4 + 10 * tokens
        assert torch.equal(arena[start : start + 10 * tokens].view(tokens, 10), -x)
        assert arena.isnan().sum() == 400 - 10 * tokens


@pytest.mark.parametrize("threads", [1, 2])
def test_unsupported_operands_are_named(threads: int) -> None:
    x = torch.zeros(1, 1, 1, 4, dtype=torch.int32)
    good, bases = instruction(Op.OP_UNARY, [x, x], x.shape, [x.stride()] * 2, [0])
    bad, _ = instruction(Op.OP_UNARY, [x, x], x.shape, [x.stride()] * 2, [UnaryKind.UNARY_EXP])
    unknown, _ = instruction(Op.OP_BINARY, [x, x], x.shape, [x.stride()] * 2, [99])
    with pytest.raises(BackendError, match=r"instruction 1 \(OP_UNARY\) has a dtype or attribute"):
        execute([good, bad], bases, threads)
    with pytest.raises(BackendError, match=r"instruction 0 \(OP_BINARY\)"):
        execute([unknown], bases, threads)
