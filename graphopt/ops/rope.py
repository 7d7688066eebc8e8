"""graphopt::rope: rotary position embedding of query or key heads.

The first R columns of each head are turned, the others pass through. The two columns of a pair
turn by one angle:

    rotate-half (Llama)   pair i is (x[i], x[i + R/2])     rotate(x) = cat(-x[R/2:R], x[:R/2])
    interleaved (GPT-J)   pair i is (x[2i], x[2i + 1])     rotate(x) = (-x[1], x[0], -x[3], x[2] ..)

    y = cat(x[:R] * cos + rotate(x[:R]) * sin,  x[R:])

Tables hold an angle a column (R = their width), or, with `half_tables`, an angle a pair (R = twice
their width). Source: Su et al. 2021, arXiv 2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ir.opset import Cost, define, nbytes
from graphopt.ops import operands

SCHEMA = (
    "rope(Tensor x_BHSD, Tensor cos_BSR, Tensor sin_BSR, *, bool interleaved=False, "
    "bool half_tables=False) -> Tensor"
)


def reference(
    x_BHSD: Tensor,
    cos_BSR: Tensor,
    sin_BSR: Tensor,
    *,
    interleaved: bool = False,
    half_tables: bool = False,
) -> Tensor:
    """cos and sin are shared by all heads; their batch axis may be 1."""
    if half_tables:
        cos_BSR, sin_BSR = (_widened(t, interleaved) for t in (cos_BSR, sin_BSR))
    width = cos_BSR.shape[-1]
    turned, kept = x_BHSD[..., :width], x_BHSD[..., width:]
    if interleaved:
        rotated = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        rotated = torch.cat([-second, first], dim=-1)
    y = turned * cos_BSR[:, None] + rotated * sin_BSR[:, None]
    return torch.cat([y, kept], dim=-1) if kept.shape[-1] else y.contiguous()


def _widened(table: Tensor, interleaved: bool) -> Tensor:
    """An angle a pair -> an angle a column."""
    return table.repeat_interleave(2, -1) if interleaved else torch.cat([table, table], -1)


def fake(
    x_BHSD: Tensor,
    cos_BSR: Tensor,
    sin_BSR: Tensor,
    *,
    interleaved: bool = False,
    half_tables: bool = False,
) -> Tensor:
    """Like x, in the dtype torch's promotion gives, contiguous."""
    operands.rank("x_BHSD", x_BHSD, 4)
    operands.floats(x_BHSD=x_BHSD, cos_BSR=cos_BSR, sin_BSR=sin_BSR)
    operands.rank("cos_BSR", cos_BSR, 3)
    operands.sizes("sin_BSR", sin_BSR, *cos_BSR.shape)
    batch, rows, width = cos_BSR.shape
    for axis, found, wanted in ((0, batch, x_BHSD.shape[0]), (1, rows, x_BHSD.shape[2])):
        if not (isinstance(found, int) and found == 1):
            operands.size(f"axis {axis} of cos_BSR", found, wanted)
    turned, columns = width * (2 if half_tables else 1), x_BHSD.shape[3]
    if isinstance(turned, int) and isinstance(columns, int):
        is_fine = turned <= columns and turned % 2 == 0
        operands.require(is_fine, f"{turned} of {columns} columns cannot be turned in pairs")
    dtype = torch.promote_types(x_BHSD.dtype, torch.promote_types(cos_BSR.dtype, sin_BSR.dtype))
    return x_BHSD.new_empty(x_BHSD.shape, dtype=dtype)


def cost(x_BHSD: Tensor, cos_BSR: Tensor, sin_BSR: Tensor, **_: bool) -> Cost:
    """Two products and a sum an element."""
    return Cost(3.0 * x_BHSD.numel(), 2.0 * nbytes(x_BHSD) + nbytes(cos_BSR, sin_BSR))


SPEC = define(SCHEMA, reference=reference, fake=fake, cost=cost)
