"""Linear and embedding kernels against float64, their integer definition, and themselves."""

from __future__ import annotations

import math

import pytest
import torch
from native_plan import call
from torch import Tensor

from graphopt.codegen.cpu.abi import Op
from graphopt.codegen.cpu.packing import KernelWeight, pack_dense, pack_low_bit, unpack
from graphopt.errors import UnsupportedError
from graphopt.ir.weights import PackedWeight
from graphopt.ops.linear_wq import quantize_activations

SHAPES = [(1, 32), (7, 64), (17, 576), (192, 96), (130, 1536)]


def random_packed(n: int, k: int, bits: int, zero: bool, group: int = 32) -> PackedWeight:
    if bits == 4:
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    else:
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    scale = (torch.rand(n, k // group) * 0.02 + 0.001).half()
    zeros = (torch.randn(n, k // group) * 0.1).half() if zero else None
    return PackedWeight(bits, group, codes, scale, zeros, 8 if bits == 4 and not zero else 0, "")


def run(
    weight: KernelWeight, x_MK: Tensor, bias: Tensor | None, mode: int, threads: int = 2
) -> Tensor:
    rows = x_MK.shape[0]
    out = torch.full((rows, weight.n + 3), float("nan"), dtype=x_MK.dtype)
    operands = [out, x_MK, weight.data, bias]
    strides = [[out.stride(0)], [x_MK.stride(0)], [], []]
    attrs = (weight.kind, mode, int(bias is not None), 0, weight.offset)
    dims = (rows, weight.n, weight.k)
    flat = weight.data.view(torch.uint8).flatten()
    call(Op.OP_LINEAR, [out, x_MK, flat, bias], dims, strides, attrs, threads=threads)
    del operands
    assert out[:, weight.n :].isnan().all()
    return out[:, : weight.n]


def close(actual: Tensor, expected: Tensor, k: int) -> None:
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[actual.dtype]
    size = expected.abs().max().clamp_min(1e-3)
    error = (actual.double() - expected).abs().max() / size
    assert error < tolerance * max(1.0, math.sqrt(k) / 8), error


@pytest.mark.parametrize("rows", [1, 2, 5, 9, 33, 130])
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (5, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    w, x = torch.randn(n, k).to(dtype), torch.randn(rows, k + 2).to(dtype)[:, :k]
    bias = torch.randn(n).to(dtype)
    actual = run(pack_dense(w), x, bias, 0)
    close(actual, x.double() @ w.double().t() + bias.double(), k)


@pytest.mark.parametrize("rows", [1, 3, 8, 37])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_bit_float(
    rows: int, n: int, k: int, bits: int, zero: bool, dtype: torch.dtype
) -> None:
    packed, x = random_packed(n, k, bits, zero), torch.randn(rows, k).to(dtype)
    actual = run(pack_low_bit(packed), x, None, 0)
    close(actual, x.double() @ packed.dequantize(torch.float64).t(), k)


@pytest.mark.parametrize("rows", [1, 3, 4, 6, 37, 300])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", [False, True])
def test_low_bit_int8_is_its_definition(
    rows: int, n: int, k: int, bits: int, zero: bool
) -> None:
    packed, x = random_packed(n, k, bits, zero), torch.randn(rows, k) * 3
    x[0, :32] = 0.0
    codes, scale = quantize_activations(x)
    exact = (codes.double() * scale.double()).flatten(-2)
    bias = torch.randn(n)
    actual = run(pack_low_bit(packed), x, bias, 1)
    close(actual, exact @ packed.dequantize(torch.float64).t() + bias.double(), k)


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("kind", ["f32", "bf16", "4", "4z", "8"])
def test_a_row_does_not_depend_on_the_batch(kind: str, mode: int) -> None:
    n, k = 200, 1536
    if kind in ("f32", "bf16"):
        if mode == 1:
            pytest.skip("dense weights have no int8 mode")
        dtype = torch.float32 if kind == "f32" else torch.bfloat16
        weight = pack_dense(torch.randn(n, k).to(dtype))
    else:
        weight = pack_low_bit(random_packed(n, k, int(kind[0]), kind.endswith("z")))
    x = torch.randn(70, k)
    whole = run(weight, x, None, mode)
    for rows in (1, 2, 3, 4, 5, 7, 8, 9, 31):
        for threads in (1, 2, 3):
            assert torch.equal(run(weight, x[:rows], None, mode, threads), whole[:rows])
    assert torch.equal(run(weight, x[41:42], None, mode), whole[41:42])


def test_dense_weights_refuse_int8_activations() -> None:
    weight = pack_dense(torch.randn(8, 32))
    with pytest.raises(Exception, match="OP_LINEAR"):
        run(weight, torch.randn(1, 32), None, 1)


@pytest.mark.parametrize("group", [32, 64, 96])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_several_blocks(bits: int, group: int) -> None:
    packed, x = random_packed(20, 192, bits, True, group), torch.randn(3, 192)
    actual = run(pack_low_bit(packed), x, None, 0)
    close(actual, x.double() @ packed.dequantize(torch.float64).t(), 192)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "4", "4z", "8", "8z"])
def test_embedding(kind: str, dtype: torch.dtype) -> None:
    n, k = 41, 96
    if kind == "dense":
        table = torch.randn(n, k).to(dtype)
        weight = pack_dense(table)
        expected_table = table.double()
    else:
        packed = random_packed(n, k, int(kind[0]), kind.endswith("z"))
        weight, expected_table = pack_low_bit(packed), packed.dequantize(torch.float64)
    ids = torch.randint(0, n, (23,))
    out = torch.full((23, k), float("nan"), dtype=dtype)
    flat = weight.data.view(torch.uint8).flatten()
    attrs = (weight.kind, n, 0, 0, weight.offset)
    call(Op.OP_EMBED, [out, ids, flat], (23, k), [[k], [1], []], attrs, (1.0,))
    close(out, expected_table[ids], 1)


def test_unsupported_layouts_are_named() -> None:
    with pytest.raises(UnsupportedError, match="float64"):
        pack_dense(torch.randn(8, 32, dtype=torch.float64))
    with pytest.raises(UnsupportedError, match="groups of 16"):
        pack_low_bit(random_packed(8, 64, 4, False, 16))
    bad = random_packed(8, 64, 8, False)
    bad.codes_NKp[3, 3] = -128
    with pytest.raises(UnsupportedError, match="-128"):
        pack_low_bit(bad)
