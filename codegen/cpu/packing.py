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
    if packed.bits == 8 and bool((packed.codes_NKp == -128).any()):
        raise UnsupportedError("8-bit codes of -128 have no CPU kernel; supported: -127..127")
    panels, groups = -(-n // COLUMNS), k // GROUP
    repeat = packed.group // GROUP
    parts = [_halves(packed.scale_NG, panels, repeat)]
    if packed.zero_NG is not None:
        parts.append(_halves(packed.zero_NG, panels, repeat))
    codes = _padded(packed.codes_NKp.view(torch.uint8), panels * COLUMNS)
    if packed.bits == 8:
        quads = codes.view(panels, COLUMNS, groups, 8, 4).permute(0, 2, 3, 1, 4)
        parts.append(quads.reshape(panels, groups, 256))
    else:
        # Byte j holds columns 2j and 2j + 1: split the nibbles, then pair quad 2j with 2j + 1.
        nibbles = torch.stack([codes & 15, codes >> 4], dim=-1)
        quads = nibbles.view(panels, COLUMNS, groups, 4, 2, 4).permute(0, 2, 3, 4, 1, 5)
        paired = quads[:, :, :, 0] | (quads[:, :, :, 1] << 4)
        parts.append(paired.reshape(panels, groups, 128))
    data = torch.cat(parts, dim=-1)
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
    codes = weight.data[..., 16 * (1 + has_zero) :]
    if bits == 8:
        lanes = codes.reshape(panels, groups, 8, COLUMNS, 4).permute(0, 3, 1, 2, 4)
        plain = lanes.reshape(-1, weight.k)[: weight.n].contiguous().view(torch.int8)
    else:
        paired = codes.reshape(panels, groups, 4, COLUMNS, 4)
        quads = torch.stack([paired & 15, paired >> 4], dim=3)
        nibbles = quads.permute(0, 4, 1, 2, 3, 5).reshape(-1, weight.k // 2, 2)
        plain = (nibbles[..., 0] | (nibbles[..., 1] << 4))[: weight.n].contiguous()
    return PackedWeight(
        bits,
        weight.group,
        plain,
        scale[: weight.n, ::repeat].contiguous(),
        zero[0][: weight.n, ::repeat].contiguous() if zero else None,
        weight.offset,
        weight.source_format,
    )


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
