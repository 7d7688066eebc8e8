"""torch dtypes as the native kernels number them."""

from __future__ import annotations

import torch

from graphopt.codegen.cpu.abi import DType

NATIVE_DTYPES: dict[torch.dtype, DType] = {
    torch.float32: DType.F32,
    torch.bfloat16: DType.BF16,
    torch.float16: DType.F16,
    torch.int64: DType.I64,
    torch.int32: DType.I32,
    torch.uint8: DType.U8,
    torch.int8: DType.I8,
    torch.bool: DType.BOOL,
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
