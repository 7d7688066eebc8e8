"""graphopt::embedding_wq: rows of a low-bit embedding table, dequantized on the way out.

Layout of codes, scales and zeros: `graphopt.ir.weights`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ir.opset import Cost, define, nbytes
from graphopt.ir.weights import dequantize_codes
from graphopt.ops import operands
from graphopt.ops.linear_wq import check_weight

SCHEMA = (
    "embedding_wq(Tensor ids, Tensor codes_NKp, Tensor scale_NG, Tensor? zero_NG=None, *, "
    "int bits, int group, int offset, ScalarType dtype) -> Tensor"
)


def reference(
    ids: Tensor,
    codes_NKp: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None = None,
    *,
    bits: int,
    group: int,
    offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """Only the rows asked for are dequantized. Result `[*ids.shape, K]` in `dtype`."""
    flat = ids.flatten()
    zero = None if zero_NG is None else zero_NG[flat]
    rows = dequantize_codes(codes_NKp[flat], scale_NG[flat], zero, bits, group, offset)
    return rows.to(dtype).reshape(*ids.shape, -1)


def fake(
    ids: Tensor,
    codes_NKp: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None = None,
    *,
    bits: int,
    group: int,
    offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """`[*ids.shape, K]` in `dtype`."""
    width = check_weight(codes_NKp, scale_NG, zero_NG, bits, group, offset)
    is_ids = ids.dtype in (torch.int64, torch.int32)
    operands.require(is_ids, f"ids are {ids.dtype}, not torch.int64")
    operands.require(dtype.is_floating_point, f"{dtype} is no dtype of a weight")
    return torch.empty((*ids.shape, width), dtype=dtype, device=ids.device)


def cost(
    ids: Tensor,
    codes_NKp: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None = None,
    *,
    bits: int,
    dtype: torch.dtype,
    **_: object,
) -> Cost:
    """Two operations an element; the rows read once, and written."""
    width = codes_NKp.shape[1] * (2 if bits == 4 else 1)
    row_bytes = nbytes(codes_NKp, scale_NG, zero_NG) / codes_NKp.shape[0]
    return Cost(2.0 * ids.numel() * width, ids.numel() * (row_bytes + width * dtype.itemsize))


SPEC = define(SCHEMA, reference=reference, fake=fake, cost=cost)
