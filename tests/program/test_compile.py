"""`graphopt.compile` as a whole: what a program keeps of the model it was made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny_models import tiny_llama
from torch import Tensor, nn

import graphopt

IDS = torch.randint(0, 101, (2, 7), generator=torch.Generator().manual_seed(3))
ROADS: list[dict[str, Any]] = [
    {"backend": "cpu"},
    {"backend": "cpu", "serving": "off"},
    {"backend": "reference"},
    {"backend": "reference", "serving": "off"},
    {"backend": "cpu", "passes": ["insert_kv_cache"]},
]


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("captured", [False, True])
def test_a_program_owns_its_weights(road: dict[str, Any], captured: bool) -> None:
    model = tiny_llama()
    program = graphopt.compile(graphopt.capture(model) if captured else model, **road)
    with torch.no_grad():
        expected = model(IDS).logits
        for index, parameter in enumerate(model.parameters()):
            # Neither way may be seen; the second leaves no trace in the version of the tensor.
            if index % 2:
                parameter.add_(1.0)
            else:
                parameter.data.mul_(3.0)
    found = program(IDS)
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(program(IDS), found, rtol=0, atol=0)


def test_a_broadcast_weight_stays_small() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(1, 64).expand(4096, 64))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.mask[: x.shape[0]]

    model = Masked().eval()
    program = graphopt.compile(model, torch.randn(4, 64), backend="reference")
    (weight,) = program.graph.weights.values()
    assert weight.shape == (4096, 64)
    assert weight.untyped_storage().nbytes() == 64 * 4
    assert weight.data_ptr() != model.mask.data_ptr()
