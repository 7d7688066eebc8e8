"""GGUF blocks as `PackedWeight`: the same codes and scales in another byte order, nothing rounded.

A block holds 32 neighbouring columns of one row (layouts: ggml-common.h):

    Q4_0   d f16 | 16 bytes                    W = d * (code - 8)
    Q4_1   d f16 | m f16 | 16 bytes            W = d * code + m
    Q8_0   d f16 | 32 int8                     W = d * code

GGUF's 16 nibble bytes put column j low and column j+16 high; `PackedWeight` puts neighbouring
columns 2j and 2j+1 in one byte.
"""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from graphopt.errors import UnsupportedError
from graphopt.ir.weights import PackedWeight

_GROUP = 32
PACKABLE = (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0)


def pack_blocks(raw_NB: NDArray[np.uint8], type_: GGMLQuantizationType) -> PackedWeight:
    """`PackedWeight [N, K]` of raw rows uint8 `[N, bytes of a row]`; shares no memory with them.

    Raises UnsupportedError for block types outside `PACKABLE`.
    """
    if type_ not in PACKABLE:
        names = ", ".join(known.name for known in PACKABLE)
        raise UnsupportedError(f"{type_.name} blocks cannot stay packed; {names} can")
    rows = raw_NB.shape[0]
    has_zero = type_ == GGMLQuantizationType.Q4_1
    bits = 8 if type_ == GGMLQuantizationType.Q8_0 else 4
    head = 4 if has_zero else 2
    blocks_NGb = raw_NB.reshape(rows, -1, head + _GROUP * bits // 8)
    codes_NGb = blocks_NGb[..., head:]
    codes_NKp = (
        codes_NGb.copy().view(np.int8) if bits == 8 else _pair_neighbours(codes_NGb)
    ).reshape(rows, -1)
    return PackedWeight(
        bits=bits,
        group=_GROUP,
        codes_NKp=torch.from_numpy(codes_NKp),
        scale_NG=_half(blocks_NGb[..., 0:2]),
        zero_NG=_half(blocks_NGb[..., 2:4]) if has_zero else None,
        offset=8 if type_ == GGMLQuantizationType.Q4_0 else 0,
        source_format=type_.name,
    )


def unpack_blocks(weight: PackedWeight) -> NDArray[np.uint8]:
    """The inverse of `pack_blocks`: raw GGUF rows uint8 `[N, bytes of a row]`, byte for byte."""
    rows, columns = weight.shape
    groups = columns // _GROUP
    codes_NGb = weight.codes_NKp.numpy().view(np.uint8).reshape(rows, groups, -1)
    if weight.bits == 4:
        codes_NGb = _pair_halves(codes_NGb)
    heads = [weight.scale_NG] + ([] if weight.zero_NG is None else [weight.zero_NG])
    head_NGb = [head.numpy().view(np.uint8).reshape(rows, groups, 2) for head in heads]
    return np.concatenate([*head_NGb, codes_NGb], axis=-1).reshape(rows, -1)


def take_rows(weight: PackedWeight, rows_N: torch.Tensor) -> PackedWeight:
    """The weight whose row n is row `rows_N[n]` of `weight`; exact, blocks never span rows."""
    return PackedWeight(
        bits=weight.bits,
        group=weight.group,
        codes_NKp=weight.codes_NKp[rows_N],
        scale_NG=weight.scale_NG[rows_N],
        zero_NG=None if weight.zero_NG is None else weight.zero_NG[rows_N],
        offset=weight.offset,
        source_format=weight.source_format,
    )


def _half(bytes_NGb: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(bytes_NGb.copy().view(np.float16)[..., 0])


def _pair_neighbours(halves: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Last axis 16 bytes of (j, j+16) -> 16 bytes of (2j, 2j+1)."""
    even, odd = halves[..., 0::2], halves[..., 1::2]
    return np.concatenate([(even & 0x0F) | (odd << 4), (even >> 4) | (odd & 0xF0)], axis=-1)


def _pair_halves(neighbours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Last axis 16 bytes of (2j, 2j+1) -> 16 bytes of (j, j+16)."""
    low, high = neighbours[..., :8], neighbours[..., 8:]
    halves = np.empty_like(neighbours)
    halves[..., 0::2] = (low & 0x0F) | (high << 4)
    halves[..., 1::2] = (low >> 4) | (high & 0xF0)
    return halves
