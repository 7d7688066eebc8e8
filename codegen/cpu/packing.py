"""Weights in the layouts of `native/linear.h`, and back, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from graphopt.errors import UnsupportedError
from graphopt.ir.weights import PackedWeight

PANEL = 16
COLUMNS = 8
GROUP = 32
# The integer kernel sums 16 products of (code - offset) and an int8 in 16 bits.
MAX_OFFSET_4BIT = 16


class WeightKind(IntEnum):
    """As in `native/linear.h`."""

    WEIGHT_F32 = 0
    WEIGHT_BF16 = 1
    WEIGHT_F16 = 2
    WEIGHT_4BIT = 3
    WEIGHT_4BIT_ZERO = 4
    WEIGHT_8BIT = 5
    WEIGHT_8BIT_ZERO = 6


_DENSE = {
    torch.float32: WeightKind.WEIGHT_F32,
    torch.bfloat16: WeightKind.WEIGHT_BF16,
    torch.float16: WeightKind.WEIGHT_F16,
}
_LOW_BIT = {
    (4, False): WeightKind.WEIGHT_4BIT,
    (4, True): WeightKind.WEIGHT_4BIT_ZERO,
    (8, False): WeightKind.WEIGHT_8BIT,
    (8, True): WeightKind.WEIGHT_8BIT_ZERO,
}


@dataclass(frozen=True, slots=True, eq=False)
class KernelWeight:
    """A weight `[n, k]` as the kernels read it. group: of the original scales (0 for dense)."""

    kind: WeightKind
    data: Tensor
    n: int
    k: int
    group: int = 0
    offset: int = 0
    source_format: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.data.numel() * self.data.element_size()


def pack_dense(weight_NK: Tensor) -> KernelWeight:
    """Panels of 16 outputs. Raises UnsupportedError for dtypes without a kernel."""
    if weight_NK.dtype not in _DENSE:
        raise UnsupportedError(
            f"linear weights of {weight_NK.dtype} have no CPU kernel; supported: "
            f"{', '.join(map(str, _DENSE))}"
        )
    n, k = weight_NK.shape
    panels = -(-n // PANEL)
    data = weight_NK.new_zeros((panels, k, PANEL))
    whole = n // PANEL
    data[:whole] = weight_NK[: whole * PANEL].view(whole, PANEL, k).transpose(1, 2)
    if whole < panels:
        data[whole, :, : n - whole * PANEL] = weight_NK[whole * PANEL :].t()
    return KernelWeight(_DENSE[weight_NK.dtype], data, n, k)


def pack_low_bit(packed: PackedWeight) -> KernelWeight:
    """Panels of 8 outputs by blocks of 32 columns; see `native/linear.h`.

    Raises UnsupportedError for layouts without a kernel.
    """
    n, k = packed.shape
    if (packed.bits, True) not in _LOW_BIT or packed.group % GROUP or k % packed.group:
        raise UnsupportedError(
            f"{packed.bits}-bit weights in groups of {packed.group} over {k} columns have no CPU "
            f"kernel; supported: 4 or 8 bits, groups that are multiples of {GROUP} and divide K"
        )
    if packed.bits == 4 and not 0 <= packed.offset <= MAX_OFFSET_4BIT:
        raise UnsupportedError(
            f"4-bit weights with offset {packed.offset} have no CPU kernel; supported: offsets "
            f"0 to {MAX_OFFSET_4BIT}"
        )
    panels, groups = -(-n // COLUMNS), k // GROUP
    repeat = packed.group // GROUP
    halves = [packed.scale_NG, *([] if packed.zero_NG is None else [packed.zero_NG])]
    header = len(halves) * COLUMNS * 2
    codes = _padded(packed.codes_NKp.view(torch.uint8), panels * COLUMNS)
    data = codes.new_empty((panels, groups, header + COLUMNS * GROUP * packed.bits // 8))
    for i, values_NG in enumerate(halves):
        data[..., 16 * i : 16 * (i + 1)] = _halves(values_NG, panels, repeat)
    if packed.bits == 4:
        first, second = codes.view(panels, COLUMNS, groups, 4, 2, 2).unbind(-2)
        codes = torch.stack(_exchange(first, second), dim=-1)
    lanes = codes.view(panels, COLUMNS, groups, packed.bits, 4).permute(0, 2, 3, 1, 4)
    data[..., header:].view(panels, groups, packed.bits, COLUMNS, 4).copy_(lanes)
    kind = _LOW_BIT[packed.bits, packed.zero_NG is not None]
    return KernelWeight(kind, data, n, k, packed.group, packed.offset, packed.source_format)


def unpack(weight: KernelWeight) -> Tensor | PackedWeight:
    """The weight as it was before packing."""
    if weight.kind in _DENSE.values():
        return weight.data.transpose(1, 2).reshape(-1, weight.k)[: weight.n].contiguous()
    bits, has_zero = next(key for key, kind in _LOW_BIT.items() if kind is weight.kind)
    panels, groups = weight.data.shape[:2]
    halves = [weight.data[..., 16 * i : 16 * (i + 1)] for i in range(1 + has_zero)]
    repeat = weight.group // GROUP
    scale, *zero = (
        half.contiguous().view(torch.float16).transpose(1, 2).reshape(-1, groups) for half in halves
    )
    codes = weight.data[..., 16 * (1 + has_zero) :].reshape(panels, groups, bits, COLUMNS, 4)
    lanes = codes.permute(0, 3, 1, 2, 4)
    if bits == 8:
        plain = lanes.reshape(-1, weight.k)[: weight.n].contiguous().view(torch.int8)
    else:
        even, odd = lanes.view(panels, COLUMNS, groups, bits, 2, 2).unbind(-1)
        paired = torch.stack(_exchange(even, odd), dim=-2)
        plain = paired.reshape(-1, weight.k // 2)[: weight.n].contiguous()
    return PackedWeight(
        bits,
        weight.group,
        plain,
        scale[: weight.n, ::repeat].contiguous(),
        zero[0][: weight.n, ::repeat].contiguous() if zero else None,
        weight.offset,
        weight.source_format,
    )


def _exchange(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(low nibbles, high nibbles) of a and b, a's in the low half of each byte. Its own inverse.

    Bytes hold columns (2j, 2j + 1); in the kernels' layout a byte holds columns 4 apart. Of 8
    columns a is the bytes with columns 0-3 and b those with 4-7: the results have columns 0|4, 2|6
    and 1|5, 3|7.
    """
    return (a & 0x0F) | (b << 4), (a >> 4) | (b & 0xF0)


def _padded(rows: Tensor, count: int) -> Tensor:
    if rows.shape[0] == count:
        return rows.contiguous()
    padded = rows.new_zeros((count, *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    return padded


def _halves(values_NG: Tensor, panels: int, repeat: int) -> Tensor:
    """float16 `[N, G]` as the bytes of `[panels, K/32, 8]`."""
    padded = _padded(values_NG.repeat_interleave(repeat, 1), panels * COLUMNS)
    lanes = padded.view(panels, COLUMNS, -1).transpose(1, 2).contiguous()
    return lanes.view(torch.uint8)
