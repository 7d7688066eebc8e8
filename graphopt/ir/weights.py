"""Low-bit weights in the one layout every pass, op and backend agrees on.

A packed weight stands for the dense matrix `W_NK` (output rows N, input columns K) with

    W[n, k] = scale[n, k // group] * (code[n, k] - offset) + zero[n, k // group]

`zero` is a *float* zero point: it is what GGUF's Q4_1 stores, and rounding it to an integer
costs quality (it is kept exactly). Codes are stored as in the file, never re-quantized.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """One low-bit matrix.

    codes_NKp: uint8. bits == 4: `[N, K/2]`, byte j holds column 2j in its low nibble and 2j+1 in
        its high nibble. bits == 8: `[N, K]`, the code as two's-complement byte (int8 viewed
        as uint8 is not allowed: 8-bit codes are stored as torch.int8).
    scale_NG, zero_NG: float16 `[N, K/group]`; `zero_NG` is None when there is none.
    offset: integer subtracted from each code (8 for Q4_0, 0 for Q4_1 and Q8_0).
    """

    bits: int
    group: int
    codes_NKp: Tensor
    scale_NG: Tensor
    zero_NG: Tensor | None
    offset: int
    source_format: str

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the dense matrix this stands for."""
        n, packed = self.codes_NKp.shape
        return n, packed * 2 if self.bits == 4 else packed

    @property
    def nbytes(self) -> int:
        """Bytes held, scales and zeros included."""
        tensors = [self.codes_NKp, self.scale_NG, *([] if self.zero_NG is None else [self.zero_NG])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense `[N, K]` matrix, computed in float32 and cast to `dtype`."""
        return dequantize_codes(
            self.codes_NKp, self.scale_NG, self.zero_NG, self.bits, self.group, self.offset
        ).to(dtype)


def owned(*tables: dict[str, Tensor]) -> None:
    """Give every weight of these tables memory of its own, in place; a tensor that several have
    stays one. Strides are kept, also those of a view that repeats its elements."""
    copies: dict[int, Tensor] = {}
    originals: list[Tensor] = []
    for table in tables:
        for name, data in table.items():
            if data.device.type == "meta":
                continue
            if id(data) not in copies:
                originals.append(data)
                copies[id(data)] = _copy(data.detach())
            table[name] = copies[id(data)]


def _copy(data: Tensor) -> Tensor:
    if 0 not in data.stride() or not data.numel():
        return data.clone()
    # clone would write a broadcast out.
    narrow = data
    for axis, step in enumerate(data.stride()):
        if step == 0:
            narrow = narrow.narrow(axis, 0, 1)
    return narrow.clone().expand(data.shape)


def unpack_codes(codes_NKp: Tensor, bits: int) -> Tensor:
    """Codes as `[N, K]` int16 whatever their storage."""
    if bits == 8:
        return codes_NKp.to(torch.int16)
    low, high = codes_NKp & 0x0F, codes_NKp >> 4
    return torch.stack([low, high], dim=-1).flatten(-2).to(torch.int16)


def dequantize_codes(
    codes_NKp: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int, group: int, offset: int
) -> Tensor:
    """Float32 `[N, K]` of `scale * (code - offset) + zero`."""
    codes_NK = unpack_codes(codes_NKp, bits)
    n, k = codes_NK.shape
    grouped = (codes_NK - offset).float().view(n, k // group, group)
    dense = grouped * scale_NG.float()[..., None]
    if zero_NG is not None:
        dense = dense + zero_NG.float()[..., None]
    return dense.view(n, k)
