"""graphopt::linear_wq: a linear layer whose weight stays in n bits.

    y = x @ W^T + bias,   W[n, k] = scale[n, k/group] * (code[n, k] - offset) + zero[n, k/group]

Layout of codes, scales and zeros: `graphopt.ir.weights`. `activation` says what the products see:
"float": x as it is; "int8": x rounded to int8 in groups of 32 columns, scale = absmax / 127
(what llama.cpp does too), so that the inner products are exact integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ir.opset import Cost, define, nbytes
from graphopt.ir.weights import dequantize_codes
from graphopt.ops import operands

SCHEMA = (
    "linear_wq(Tensor x, Tensor codes_NKp, Tensor scale_NG, Tensor? zero_NG=None, "
    "Tensor? bias_N=None, *, int bits, int group, int offset, str activation) -> Tensor"
)
ACTIVATION_GROUP = 32


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes as float `[..., K/32, 32]`, scale `[..., K/32, 1]`), symmetric, round half to even.

    A group whose scale is below 1e-30 counts as zero: the reciprocal would overflow.
    """
    grouped = x.float().reshape(*x.shape[:-1], -1, ACTIVATION_GROUP)
    scale = grouped.abs().amax(-1, keepdim=True) / 127.0
    scale = torch.where(scale > 1e-30, scale, torch.zeros_like(scale))
    inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    return torch.round(grouped * inverse), scale


def reference(
    x: Tensor,
    codes_NKp: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None = None,
    bias_N: Tensor | None = None,
    *,
    bits: int,
    group: int,
    offset: int,
    activation: str,
) -> Tensor:
    """Dequantize, multiply in float32, cast to x's dtype."""
    weight_NK = dequantize_codes(codes_NKp, scale_NG, zero_NG, bits, group, offset)
    wide = x.float()
    if activation == "int8":
        codes, scale = quantize_activations(x)
        wide = (codes * scale).flatten(-2)
    y = wide @ weight_NK.t()
    if bias_N is not None:
        y = y + bias_N.float()
    return y.to(x.dtype)


def check_weight(
    codes_NKp: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    bits: int,
    group: int,
    offset: int,
) -> int:
    """Columns of the matrix. Raises ValueError for parts that make none."""
    wanted = {4: torch.uint8, 8: torch.int8}.get(bits)
    operands.require(wanted is not None, f"bits={bits} is neither 4 nor 8")
    operands.require(codes_NKp.dtype == wanted, f"codes_NKp is {codes_NKp.dtype}, not {wanted}")
    operands.rank("codes_NKp", codes_NKp, 2)
    rows, packed = (int(size) for size in codes_NKp.shape)
    columns = packed * (2 if bits == 4 else 1)
    is_fine = group > 0 and columns % group == 0
    operands.require(is_fine, f"{columns} columns are no groups of {group}")
    operands.require(-256 < offset < 256, f"offset={offset} is no offset of {bits} bits")
    operands.floats(scale_NG=scale_NG, zero_NG=zero_NG)
    for name, part in (("scale_NG", scale_NG), ("zero_NG", zero_NG)):
        if part is not None:
            operands.sizes(name, part, rows, columns // group)
    return columns


def fake(
    x: Tensor,
    codes_NKp: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None = None,
    bias_N: Tensor | None = None,
    *,
    bits: int,
    group: int,
    offset: int,
    activation: str,
) -> Tensor:
    """`[..., N]` in x's dtype."""
    columns = check_weight(codes_NKp, scale_NG, zero_NG, bits, group, offset)
    operands.floats(x=x, bias_N=bias_N)
    operands.require(x.ndim > 0, "x has no axis")
    operands.size("the last axis of x", x.shape[-1], columns)
    if bias_N is not None:
        operands.sizes("bias_N", bias_N, codes_NKp.shape[0])
    operands.require(activation in ("float", "int8"), f"activation={activation!r} is unknown")
    is_fine = activation == "float" or columns % ACTIVATION_GROUP == 0
    operands.require(is_fine, f"{columns} columns are no groups of {ACTIVATION_GROUP} for int8")
    return x.new_empty((*x.shape[:-1], codes_NKp.shape[0]))


def cost(
    x: Tensor,
    codes_NKp: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None = None,
    bias_N: Tensor | None = None,
    **_: object,
) -> Cost:
    """A dense product's operations; only the packed weight's bytes."""
    n = codes_NKp.shape[0]
    rows = x.numel() // x.shape[-1]
    out_bytes = rows * n * x.element_size()
    weight_bytes = nbytes(codes_NKp, scale_NG, zero_NG, bias_N)
    return Cost(2.0 * x.numel() * n, nbytes(x) + weight_bytes + out_bytes)


SPEC = define(SCHEMA, reference=reference, fake=fake, cost=cost)
