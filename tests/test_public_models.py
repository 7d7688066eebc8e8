"""Transformers as people write them by hand (`helpers/public_models`): captured, fused, equal, and
served or refused with a line that says what is in the way."""

from __future__ import annotations

import re

import pytest
from helpers import public_models
from helpers.public_measure import TOLERANCE, measure

import graphopt
from graphopt.errors import CaptureError


@pytest.mark.parametrize("name", public_models.names())
def test_a_public_model(name: str) -> None:
    sample = public_models.build(name)
    outcome = measure(sample)
    assert outcome.fused == sample.fused
    assert outcome.error < TOLERANCE
    if sample.refusal:
        assert sample.refusal in outcome.refusal
        # What works instead stands behind the code of the refusal.
        assert re.search(r" \[[a-z-]+\]; \w+ ", outcome.refusal)
    else:
        assert outcome.refusal == ""
        assert outcome.tokens == outcome.wanted
        # The same token over and over would hide much.
        assert len(set(outcome.wanted)) > 2


def test_a_scan_over_an_open_length_is_refused_with_its_line() -> None:
    sample = public_models.build("scan_over_time")
    with pytest.raises(CaptureError) as refused:
        graphopt.compile(sample.module, tuple(sample.example))
    first_line = str(refused.value).splitlines()[0]
    assert "scan_over_time.py:" in first_line
    assert "leave this axis out of dynamic=" in first_line
