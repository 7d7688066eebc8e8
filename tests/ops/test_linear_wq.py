"""graphopt::linear_wq against its formula, written out element by element."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from graphopt.ops import linear_wq

ROWS, OUTPUTS, COLUMNS, GROUP = 3, 5, 64, 32


def weight(bits: int, has_zero: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(stored codes, scale, zero, codes as integers)."""
    if bits == 4:
        stored = torch.randint(0, 256, (OUTPUTS, COLUMNS // 2), dtype=torch.uint8)
        plain = torch.empty((OUTPUTS, COLUMNS), dtype=torch.int64)
        plain[:, ::2], plain[:, 1::2] = (stored % 16).long(), (stored // 16).long()
    else:
        stored = torch.randint(-128, 128, (OUTPUTS, COLUMNS), dtype=torch.int8)
        plain = stored.long()
    scale = (torch.rand(OUTPUTS, COLUMNS // GROUP) * 0.02 + 0.001).half()
    zero = (torch.randn(OUTPUTS, COLUMNS // GROUP) * 0.1).half() if has_zero else None
    return stored, scale, zero, plain


def rounded(x: Tensor) -> Tensor:
    """Each group of 32 columns in 255 steps of its largest magnitude / 127, by hand."""
    out = torch.empty_like(x)
    for row, group in itertools.product(range(x.shape[0]), range(x.shape[1] // GROUP)):
        part = x[row, group * GROUP : (group + 1) * GROUP]
        step = max(abs(float(v)) for v in part) / 127
        codes = [round(float(v) / step) for v in part]
        assert all(-127 <= code <= 127 for code in codes)
        out[row, group * GROUP : (group + 1) * GROUP] = torch.tensor(codes).double() * step
    return out


@pytest.mark.parametrize("activation", ["float", "int8"])
@pytest.mark.parametrize("has_zero", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_bias", [False, True])
def test_reference(bits: int, has_zero: bool, activation: str, has_bias: bool) -> None:
    torch.seed()
    stored, scale, zero, plain = weight(bits, has_zero)
    offset = 8 if bits == 4 else 0
    x = torch.randn(ROWS, COLUMNS)
    bias = torch.randn(OUTPUTS) if has_bias else None
    settings = {"bits": bits, "group": GROUP, "offset": offset}
    actual = torch.ops.graphopt.linear_wq(
        x, stored, scale, zero, bias, **settings, activation=activation
    )
    seen = rounded(x.double()) if activation == "int8" else x.double()
    expected = torch.zeros((ROWS, OUTPUTS), dtype=torch.float64)
    for m, n, k in itertools.product(range(ROWS), range(OUTPUTS), range(COLUMNS)):
        value = float(scale[n, k // GROUP]) * (int(plain[n, k]) - offset)
        value += 0.0 if zero is None else float(zero[n, k // GROUP])
        expected[m, n] += value * float(seen[m, k])
    if bias is not None:
        expected += bias.double()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_int8_activations_are_rounded_and_float_ones_are_not() -> None:
    """The two differ by far more than float32 does, and by no more than half a step an element."""
    stored, scale, zero, _ = weight(8, False)
    x = torch.randn(ROWS, COLUMNS)
    settings = {"bits": 8, "group": GROUP, "offset": 0}
    plain, coarse = (
        torch.ops.graphopt.linear_wq(x, stored, scale, zero, **settings, activation=kind)
        for kind in ("float", "int8")
    )
    difference = (plain - coarse).abs()
    assert difference.max() > 1e-4 * plain.abs().max()
    weight_NK = stored.float() * scale.float().repeat_interleave(GROUP, 1)
    step_MG = x.view(ROWS, -1, GROUP).abs().amax(-1) / 127
    bound = 0.5 * step_MG.repeat_interleave(GROUP, 1) @ weight_NK.abs().t()
    assert (difference <= bound * 1.001).all()


def test_groups_of_nothing_are_nothing() -> None:
    codes, scale = linear_wq.quantize_activations(torch.zeros(2, 64))
    assert (codes == 0).all()
    assert (scale == 0).all()
    tiny = torch.full((1, 32), 1e-32)
    codes, scale = linear_wq.quantize_activations(tiny)
    assert (codes == 0).all()
    assert (scale == 0).all()
