"""Linear and embedding kernels against float64, their integer definition, and themselves."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from native_plan import assert_gap_untouched, call, instruction, poisoned
from torch import Tensor

from graphopt.codegen.cpu import build
from graphopt.codegen.cpu.abi import Instr, NativeLibrary, Op, Sym
from graphopt.codegen.cpu.packing import KernelWeight, pack_dense, pack_low_bit, unpack
from graphopt.errors import BackendError, UnsupportedError
from graphopt.ir.weights import PackedWeight, unpack_codes
from graphopt.ops.linear_wq import quantize_activations

INT8 = 1
MODES = (0, INT8)
SHAPES = [(1, 32), (7, 64), (17, 576), (192, 96), (130, 1536)]


def random_packed(
    n: int, k: int, bits: int, zero: bool, group: int = 32, offset: int | None = None
) -> PackedWeight:
    if bits == 4:
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    else:
        codes = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scale = (torch.rand(n, k // group) * 0.02 + 0.001).half()
    zeros = (torch.randn(n, k // group) * 0.1).half() if zero else None
    if offset is None:
        offset = 8 if bits == 4 and not zero else 0
    return PackedWeight(bits, group, codes, scale, zeros, offset, "")


def kernel_weight(kind: str, n: int, k: int) -> KernelWeight:
    """ "f32", "bf16", "f16", or bits with "z" for a zero point: random."""
    dense = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
    if kind in dense:
        return pack_dense(torch.randn(n, k).to(dense[kind]))
    return pack_low_bit(random_packed(n, k, int(kind[0]), kind.endswith("z")))


def run(
    weight: KernelWeight,
    x_MK: Tensor,
    bias: Tensor | None = None,
    mode: int = 0,
    threads: int = 2,
    library: NativeLibrary | None = None,
) -> Tensor:
    """x times the weight, written into NaN with a gap between the rows that must stay NaN."""
    out = poisoned(x_MK.shape[0], weight.n, dtype=x_MK.dtype)
    operands = [out, x_MK, weight.data.view(torch.uint8).flatten(), bias]
    strides = [[out.stride(0)], [x_MK.stride(0)], [], []]
    attrs = (weight.kind, mode, int(bias is not None), 0, weight.offset)
    dims = (x_MK.shape[0], weight.n, weight.k)
    instr, bases = instruction(Op.OP_LINEAR, operands, dims, strides, attrs)
    addresses = (ctypes.c_void_p * len(bases))(*bases)
    syms = (ctypes.c_int64 * Sym.SYM_COUNT)(1)
    (library or build.load_library()).run((Instr * 1)(instr), addresses, syms, threads)
    assert_gap_untouched(out)
    return out


def close(actual: Tensor, expected: Tensor, size: Tensor, roundings: float) -> None:
    """Each element within `roundings` fp32 roundings of `size` and one of the output's dtype."""
    info = torch.finfo(actual.dtype)
    bound = roundings * 2.0**-24 * size + 0.5001 * info.eps * expected.abs()
    error = (actual.double() - expected).abs()
    assert (error <= bound + info.smallest_normal * info.eps).all(), (error / bound).max()


def close_to_product(
    actual: Tensor, x_MK: Tensor, w_NK: Tensor, bias: Tensor | None = None
) -> None:
    """Within the a-priori bound of sums in chains of 64: no term has more roundings than these."""
    x, w = x_MK.double(), w_NK.double()
    expected, size = x @ w.t(), x.abs() @ w.abs().t()
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    k = x.shape[1]
    close(actual, expected, size, min(k, 64) + k // 64 + 5)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 9, 33, 250])
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (5, 33), (33, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    w, x = torch.randn(n, k).to(dtype), torch.randn(rows, k + 2).to(dtype)[:, :k]
    bias = torch.randn(n).to(dtype)
    actual = run(pack_dense(w), x, bias)
    close_to_product(actual, x, w, bias)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 37, 250])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_bit_float(
    rows: int, n: int, k: int, bits: int, zero: bool, dtype: torch.dtype
) -> None:
    packed, x = random_packed(n, k, bits, zero), torch.randn(rows, k).to(dtype)
    actual = run(pack_low_bit(packed), x)
    close_to_product(actual, x, packed.dequantize(torch.float64))


def close_to_definition(
    actual: Tensor, x_MK: Tensor, packed: PackedWeight, bias: Tensor | None = None
) -> None:
    """Within 1e-6 of the integer path in float64: exact inner products of the codes, scaled."""
    m, (n, k) = x_MK.shape[0], packed.shape
    x_codes, x_scale = quantize_activations(x_MK)
    w_codes = unpack_codes(packed.codes_NKp, packed.bits).double().view(n, -1, 32) - packed.offset
    repeat = packed.group // 32
    scale = packed.scale_NG.double().repeat_interleave(repeat, 1)
    dot_MNG = torch.einsum("mgk,ngk->mng", x_codes.double(), w_codes)
    parts = [dot_MNG * scale * x_scale.double().view(m, 1, k // 32)]
    if packed.zero_NG is not None:
        sums_MG = (x_codes.double() * x_scale.double()).sum(-1)
        zero = packed.zero_NG.double().repeat_interleave(repeat, 1)
        parts.append(sums_MG[:, None] * zero)
    if bias is not None:
        parts.append(bias.double().expand(m, n)[..., None])
    terms = torch.cat(parts, dim=-1)
    close(actual, terms.sum(-1), terms.abs().sum(-1), 1e-6 * 2**24)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 37, 300])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_bit_int8_is_its_definition(
    rows: int, n: int, k: int, bits: int, zero: bool, dtype: torch.dtype
) -> None:
    packed, x = random_packed(n, k, bits, zero), (torch.randn(rows, k) * 3).to(dtype)
    x[0, :32] = 0.0
    bias = torch.randn(n).to(dtype)
    actual = run(pack_low_bit(packed), x, bias, INT8)
    close_to_definition(actual, x, packed, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 9])
def test_activations_are_rounded_as_the_reference_does(rows: int, dtype: torch.dtype) -> None:
    """Times the identity, the outputs are code * scale: every bit of both is seen."""
    k = 96
    x = (torch.randn(rows, k) * torch.logspace(-6, 3, k)).to(dtype)
    x[0, :64] = torch.cat([torch.arange(-63.5, 64.5, 4), torch.full((32,), 3e-31)]).to(dtype)
    x[0, 0] = 127.0  # a scale of exactly 1: all of -59.5, -55.5, ... are ties
    one = torch.ones(k, k // 32, dtype=torch.float16)
    identity = PackedWeight(8, 32, torch.eye(k, dtype=torch.int8), one, None, 0, "")
    codes, scale = quantize_activations(x)
    actual = run(pack_low_bit(identity), x, None, INT8)
    assert torch.equal(actual, (codes * scale).flatten(-2).to(dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("bits", "offset"), [(4, 0), (4, 3), (4, 8), (4, 16), (8, 0), (8, 100)])
@pytest.mark.parametrize("zero", [False, True])
def test_extreme_codes_and_offsets_do_not_overflow(
    bits: int, offset: int, zero: bool, mode: int
) -> None:
    n, k = 24, 64
    packed = random_packed(n, k, bits, zero, offset=offset)
    packed.codes_NKp[:8] = 0 if bits == 4 else -128
    packed.codes_NKp[8:16] = 255 if bits == 4 else 127
    x = torch.full((6, k), 5.0)
    x[1], x[2, ::2], x[3, 1::2] = -5.0, -5.0, -5.0
    x[5] = torch.randn(k)
    actual = run(pack_low_bit(packed), x, None, mode)
    if mode == INT8:
        close_to_definition(actual, x, packed)
    else:
        close_to_product(actual, x, packed.dequantize(torch.float64))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["f32", "bf16", "f16", "4", "4z", "8", "8z"])
def test_a_row_does_not_depend_on_the_batch(kind: str, mode: int) -> None:
    if mode == INT8 and not kind[0].isdigit():
        pytest.skip("dense weights have no int8 mode")
    for n, k in [(200, 1536), (43, 96), (192, 576)]:
        weight, x = kernel_weight(kind, n, k), torch.randn(400, k)
        whole = run(weight, x, None, mode)
        for rows in (*range(1, 14), 31, 64, 193):
            for threads in (1, 2, 3):
                assert torch.equal(run(weight, x[:rows], None, mode, threads), whole[:rows])
        for row in (41, 192, 399):
            assert torch.equal(run(weight, x[row : row + 1], None, mode), whole[row : row + 1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [3, 9])
@pytest.mark.parametrize(("kind", "mode"), [("f32", 0), ("4z", 0), ("4", 1), ("4z", 1), ("8", 1)])
def test_a_value_that_is_not_finite_spoils_its_row_only(
    kind: str, mode: int, rows: int, bad: float
) -> None:
    weight, x = kernel_weight(kind, 20, 96), torch.randn(rows, 96)
    good = run(weight, x, None, mode)
    x[1, 40] = bad
    actual = run(weight, x, None, mode)
    others = torch.arange(rows) != 1
    assert torch.equal(actual[others], good[others])
    assert not actual[1].isfinite().any()


@pytest.mark.parametrize("mode", MODES)
def test_no_rows(mode: int) -> None:
    assert run(kernel_weight("4", 20, 96), torch.empty(0, 96), None, mode).shape == (0, 20)


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> NativeLibrary:
    """The kernels as a machine without AVX2, FMA and F16C gets them."""
    with pytest.MonkeyPatch.context() as patch:
        kept = [flag for flag in build.FLAGS if flag not in ("-march=native", "-O3")]
        patch.setattr(build, "FLAGS", ("-O1", *kept))
        return NativeLibrary(build.build_library(tmp_path_factory.mktemp("portable")))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3, 37])
@pytest.mark.parametrize("kind", ["f32", "bf16", "f16", "4", "4z", "8", "8z"])
def test_other_processors_compute_the_same(kind: str, rows: int, portable: NativeLibrary) -> None:
    weight, x = kernel_weight(kind, 43, 96), torch.randn(rows, 96)
    for mode in MODES if kind[0].isdigit() else (0,):
        here, there = run(weight, x, None, mode), run(weight, x, None, mode, library=portable)
        torch.testing.assert_close(there, here, rtol=0, atol=1e-6 * here.abs().max().item())
        assert torch.equal(run(weight, x[:1], None, mode, library=portable), there[:1])


def test_dense_weights_refuse_int8_activations() -> None:
    weight = pack_dense(torch.randn(8, 32))
    with pytest.raises(BackendError, match="OP_LINEAR"):
        run(weight, torch.randn(1, 32), None, INT8)


@pytest.mark.parametrize("group", [32, 64, 96])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_several_blocks(bits: int, group: int) -> None:
    packed, x = random_packed(20, 192, bits, True, group), torch.randn(3, 192)
    actual = run(pack_low_bit(packed), x)
    close_to_product(actual, x, packed.dequantize(torch.float64))


@pytest.mark.parametrize("n", [1, 8, 19])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("group", [32, 64])
def test_unpacking_gives_back_every_bit(n: int, bits: int, zero: bool, group: int) -> None:
    packed = random_packed(n, 128, bits, zero, group)
    back = unpack(pack_low_bit(packed))
    assert isinstance(back, PackedWeight)
    assert (back.bits, back.group, back.offset) == (packed.bits, packed.group, packed.offset)
    assert torch.equal(back.codes_NKp, packed.codes_NKp)
    assert torch.equal(back.scale_NG, packed.scale_NG)
    assert (back.zero_NG is None) == (packed.zero_NG is None)
    if packed.zero_NG is not None and back.zero_NG is not None:
        assert torch.equal(back.zero_NG, packed.zero_NG)


@pytest.mark.parametrize("n", [1, 16, 37])
def test_unpacking_dense(n: int) -> None:
    weight = torch.randn(n, 33)
    assert torch.equal(unpack(pack_dense(weight)), weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [1.0, 24.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["dense", "4", "4z", "8", "8z"])
def test_embedding(kind: str, dtype: torch.dtype, factor: float) -> None:
    n, k = 41, 96
    if kind == "dense":
        table = torch.randn(n, k).to(dtype)
        weight = pack_dense(table)
        expected_table, expected_zero = table.double(), 0.0
    else:
        packed = random_packed(n, k, int(kind[0]), kind.endswith("z"))
        weight, expected_table = pack_low_bit(packed), packed.dequantize(torch.float64)
        # A weight may be the small difference of its two terms.
        expected_zero = 0.0 if packed.zero_NG is None else packed.zero_NG.abs().max() * factor
    ids = torch.cat([torch.tensor([0, n - 1]), torch.randint(0, n, (21,))])
    out = poisoned(23, k, dtype=dtype)
    flat = weight.data.view(torch.uint8).flatten()
    attrs, strides = (weight.kind, n, 0, 0, weight.offset), [[out.stride(0)], [1], []]
    call(Op.OP_EMBED, [out, ids, flat], (23, k), strides, attrs, (factor,))
    assert_gap_untouched(out)
    expected = expected_table[ids] * factor
    close(out, expected, expected.abs() + expected_zero, 4)
    ids[5] = n
    with pytest.raises(BackendError, match="OP_EMBED"):
        call(Op.OP_EMBED, [out, ids, flat], (23, k), strides, attrs, (factor,))


def test_unsupported_layouts_are_named() -> None:
    with pytest.raises(UnsupportedError, match="float64"):
        pack_dense(torch.randn(8, 32, dtype=torch.float64))
    with pytest.raises(UnsupportedError, match="groups of 16"):
        pack_low_bit(random_packed(8, 64, 4, False, 16))
    with pytest.raises(UnsupportedError, match="over 48 columns"):
        pack_low_bit(random_packed(8, 48, 4, False))
    for offset in (-1, 17):
        with pytest.raises(UnsupportedError, match=f"offset {offset} .* 0 to 16"):
            pack_low_bit(random_packed(8, 64, 4, False, offset=offset))
