"""What the algebra sees in a constant tensor: every element is compared, nothing is assumed.

    one value everywhere              that number: tensors of one element, and tables
    integers in equal steps           start + step * index, tables of positions
    a few bands along the diagonal    a tree of conditions on column - row: causal masks, windows

Anything else stays a `Read`. A constant is the value at the time of capture: parameters and
buffers of a captured graph do not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks.algebra import Expr, Var

_LARGEST = 8192
_MOST_BANDS = 4
_FEWEST_STEPS = 3


def read_constant(data: Tensor) -> Expr | None:
    """An element of `data` in a0, a1, ...; None when it has none of the forms above."""
    if data.device.type == "meta" or data.numel() == 0 or data.is_complex() or data.is_quantized:
        return None
    for form in (_uniform, _steps, _bands):
        found = form(data)
        if found is not None:
            return found
    return None


def _uniform(data: Tensor) -> Expr | None:
    """Vectors are left alone: those of heads (slopes, sinks) are operands wherever they are."""
    if data.numel() > 1 and (data.ndim < 2 or min(data.shape[-2:]) < 2):
        return None
    value = data.flatten()[0] if data.is_contiguous() else data[(0,) * data.ndim]
    # NaN equals nothing, itself included.
    return ia.number(value.item()) if bool((data == value).all()) else None


def _steps(data: Tensor) -> Expr | None:
    """All sizes but the last are 1; floats must be whole numbers, which float32 holds exactly."""
    length = data.shape[-1]
    if not _FEWEST_STEPS <= length <= _LARGEST or data.numel() != length:
        return None
    is_float = data.dtype in (torch.float32, torch.float64)
    if data.dtype not in (torch.int32, torch.int64) and not is_float:
        return None
    row = data.reshape(length)
    start, step = row[0].item(), (row[1] - row[0]).item()
    if not (float(start).is_integer() and float(step).is_integer()) or step == 0:
        return None
    if not torch.equal(row, start + step * torch.arange(length).to(row.dtype)):
        return None
    index = ia.add(ia.integer(int(start)), Var(f"a{data.ndim - 1}"), int(step))
    return ia.Call("float", (index,)) if is_float else index


def _bands(data: Tensor) -> Expr | None:
    """The last two axes, whose diagonals hold one value each."""
    if data.ndim < 2:
        return None
    rows, columns = data.shape[-2:]
    if data.numel() != rows * columns or min(rows, columns) < 2 or max(rows, columns) > _LARGEST:
        return None
    table = data.reshape(rows, columns)
    if not torch.equal(table[1:, 1:], table[:-1, :-1]):
        return None
    # Values by column - row, from the lower left corner to the upper right one.
    values = torch.cat([table[1:, 0].flip(0), table[0]])
    ends = (values[1:] != values[:-1]).nonzero().flatten().tolist()
    if len(ends) > _MOST_BANDS:
        return None
    i, j = Var(f"a{data.ndim - 2}"), Var(f"a{data.ndim - 1}")
    result: Expr = ia.number(values[-1].item())
    for end in reversed(ends):
        last = ia.less_equal(j, ia.add(i, ia.integer(end - (rows - 1))))
        result = ia.choose(last, ia.number(values[end].item()), result)
    return result
