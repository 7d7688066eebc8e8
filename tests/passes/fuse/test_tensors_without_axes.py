"""Tensors of one number and no axis, of which torch takes the axes 0 and -1: no pass stumbles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.run_graph import CLEANUP, FUSE, apply, run
from torch import Tensor, nn

from graphopt.capture import capture

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda t: t.softmax(0),
    "softmax of the last": lambda t: torch.softmax(t, -1),
    "log_softmax": lambda t: torch.log_softmax(t, -1),
    "rms": lambda t: t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6),
    "centred": lambda t: (t - t.mean(-1, keepdim=True)) * torch.rsqrt(t.pow(2).mean(-1) + 1e-6),
    "variance": lambda t: t * torch.rsqrt(t.var(-1, unbiased=False, keepdim=True) + 1e-6),
    "transpose": lambda t: t.transpose(0, -1) + t.t(),
    "cumsum": lambda t: t.cumsum(0) + t.flip(0),
}


class OfOneNumber(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return x + self.function(x.sum())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_number_goes_through_all_passes(name: str) -> None:
    model, x = OfOneNumber(FUNCTIONS[name]).eval(), torch.randn(2, 6)
    graph = capture(model, x)
    apply(graph, *CLEANUP, *FUSE)
    torch.testing.assert_close(run(graph, x), model(x))
