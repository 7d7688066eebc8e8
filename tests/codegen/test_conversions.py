"""Values that every float dtype must keep, in the vector part of a row and in its scalar tail."""

from __future__ import annotations

import pytest
import torch
from native_plan import call

from graphopt.codegen.cpu.abi import Op, UnaryKind

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LANES = 8
EDGES = [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), 65504.0, -65504.0, 65519.0, 65520.0]
EDGES += [1e30, 2.0**-14, 2.0**-24, 2.0**-25, 3e-8, -6e-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11]


def converted(x: torch.Tensor, to: torch.dtype) -> torch.Tensor:
    out = torch.zeros(len(x), dtype=to)
    steps = [[0, 0, 0, 1]] * 2
    call(Op.OP_UNARY, [out, x], [1, 1, 1, len(x)], steps, [UnaryKind.UNARY_COPY], threads=1)
    return out


def identity(x: torch.Tensor) -> torch.Tensor:
    """Through fp32 and back: the absolute value by max(x, x)."""
    out = torch.zeros_like(x)
    shape = [1, 1, 1, len(x)]
    call(Op.OP_BINARY, [out, x, x], shape, [[0, 0, 0, 1]] * 3, [4], threads=1)
    return out


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("width", range(1, 2 * LANES + 2))
@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_nan_stays_nan_in_every_place(
    source: torch.dtype, to: torch.dtype, width: int, sign: int
) -> None:
    for place in range(width):
        x = torch.arange(width).to(source)
        x[place] = sign * float("nan")
        for out in (converted(x, to), identity(x)):
            assert out.isnan().nonzero().flatten().tolist() == [place]
            others = torch.arange(width) != place
            assert torch.equal(out[others].float(), x[others].float())


@pytest.mark.parametrize("payload", [0x7F800001, 0x7F80FFFF, 0x7FC00000, 0x7FFFFFFF])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("to", FLOATS)
def test_every_kind_of_nan(to: torch.dtype, negative: bool, payload: int) -> None:
    """Those whose payload lies in the bits that a half drops, too."""
    word = payload - (1 << 31 if negative else 0)
    x = torch.full((2 * LANES + 3,), word, dtype=torch.int32).view(torch.float32)
    assert converted(x, to).isnan().all()


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_edges_are_rounded_as_torch_does(source: torch.dtype, to: torch.dtype) -> None:
    edges = torch.tensor(EDGES).to(source)
    for width in range(1, 2 * LANES + 2):
        for first in range(len(edges)):
            x = edges.roll(-first)[:width].contiguous()
            out, expected = converted(x, to), x.to(to)
            same = (out == expected) & (out.signbit() == expected.signbit())
            assert same.all(), (x, out, expected)
