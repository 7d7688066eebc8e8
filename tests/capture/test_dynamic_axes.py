"""Ill-typed `dynamic=`: refused with the input, the axis and the legal form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny_models import tiny_llama

import graphopt
from graphopt.errors import CaptureError


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"input_ids": ["a"]}, r"dynamic must be .*'input_ids' has \['a'\]"),
        ("batch", "dynamic must be .*not 'batch'"),
        (None, "dynamic must be .*not None"),
        ({"input_ids": {0: "my batch"}}, "calls axis 0 of 'input_ids' 'my batch'; a name is"),
        ({"input_ids": {0: 3}}, "calls axis 0 of 'input_ids' 3"),
        ({"input_ids": {5: "n"}}, "axis 5 of 'input_ids', which has axes 0 to 1"),
        ({"input_ids": {-1: "n"}}, "axis -1 of 'input_ids'"),
        ({"input_ids": {"0": "n"}}, "axis '0' of 'input_ids'"),
        ({"ids": {0: "n"}}, "dynamic names 'ids', which is no tensor of the example"),
    ],
)
def test_wrong_axes_are_named(dynamic: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        graphopt.capture(tiny_llama(), torch.ones((2, 8), dtype=torch.int64), dynamic=dynamic)
