"""Builds one-instruction plans from torch tensors, for tests of the native kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.codegen.cpu.abi import Dim, DType, Instr, Op, Operand, Sym
from graphopt.codegen.cpu.build import load_library

DTYPES = {
    torch.float32: DType.F32,
    torch.bfloat16: DType.BF16,
    torch.float16: DType.F16,
    torch.int64: DType.I64,
    torch.int32: DType.I32,
    torch.uint8: DType.U8,
    torch.int8: DType.I8,
    torch.bool: DType.BOOL,
}


def instruction(
    op: Op,
    operands: Sequence[Tensor | None],
    dims: Sequence[int],
    strides: Sequence[Sequence[int]],
    attrs_i: Sequence[int] = (),
    attrs_f: Sequence[float] = (),
) -> tuple[Instr, list[int]]:
    """An Instr whose operand i is base i, and the bases' addresses."""
    instr = Instr(op=op, barrier=1)
    instr.absent_operands()
    bases = [0] * 8
    for i, tensor in enumerate(operands):
        if tensor is not None:
            instr.operands[i] = Operand(i, DTYPES[tensor.dtype], 0, 0)
            bases[i] = tensor.data_ptr()
    for i, extent in enumerate(dims):
        instr.dims[i] = Dim(extent, Sym.SYM_ONE)
    for i, row in enumerate(strides):
        for j, stride in enumerate(row):
            instr.strides[i][j] = stride
    for i, value in enumerate(attrs_i):
        instr.attrs_i[i] = value
    for i, real in enumerate(attrs_f):
        instr.attrs_f[i] = real
    return instr, bases


def execute(instrs: Sequence[Instr], bases: Sequence[int], threads: int = 2, **syms: int) -> None:
    """Run the instructions; `syms` by name (SYM_TOKENS=...)."""
    extents = (ctypes.c_int64 * Sym.SYM_COUNT)(1)
    for name, value in syms.items():
        extents[Sym[name]] = value
    plan = (Instr * len(instrs))(*instrs)
    addresses = (ctypes.c_void_p * len(bases))(*bases)
    load_library().run(plan, addresses, extents, threads)


def call(
    op: Op,
    operands: Sequence[Tensor | None],
    dims: Sequence[int],
    strides: Sequence[Sequence[int]],
    attrs_i: Sequence[int] = (),
    attrs_f: Sequence[float] = (),
    threads: int = 2,
    **syms: int,
) -> None:
    """Run one instruction on tensors."""
    instr, bases = instruction(op, operands, dims, strides, attrs_i, attrs_f)
    execute([instr], bases, threads, **syms)


def poisoned(*shape: int, dtype: torch.dtype, gap: int = 5) -> Tensor:
    """A NaN-filled view whose last axis is contiguous but whose rows have `gap` elements between
    them: what must not be written can be checked to be NaN still."""
    wide = torch.full((*shape[:-1], shape[-1] + gap), float("nan"), dtype=dtype)
    return wide[..., : shape[-1]]


def strided_randn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Random values in a view like `poisoned`'s."""
    view = poisoned(*shape, dtype=dtype, gap=3)
    view.copy_(torch.randn(shape) * scale)
    return view


def assert_gap_untouched(view: Tensor) -> None:
    """The elements between the rows of a `poisoned` view are NaN still."""
    whole = torch.as_strided(
        view, (*view.shape[:-1], view.stride(-2)), (*view.stride()[:-1], 1), view.storage_offset()
    )
    assert whole[..., view.shape[-1] :].isnan().all()


def assert_close(actual: Tensor, expected64: Tensor, ulps: float = 4.0) -> None:
    """`actual` is within `ulps` units of its dtype's precision (fp32: at least 1e-6 relative to
    the largest value too) of the float64 `expected64`."""
    eps = torch.finfo(actual.dtype).eps
    bound = ulps * eps * expected64.abs() + ulps * torch.finfo(torch.float32).eps * (
        expected64.abs().amax() + 1e-30
    )
    difference = (actual.double() - expected64).abs()
    assert actual.isfinite().all()
    assert (difference <= bound).all(), f"worst {(difference / bound).max().item():.2f} x bound"
