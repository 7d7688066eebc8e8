"""Transformers as people write them by hand (`helpers/public_models`): captured, fused, equal, and
served or refused with a line that says what is in the way."""

from __future__ import annotations

import re

import pytest
from helpers import public_models
from helpers.public_measure import TOLERANCE, measure

PLACE = re.compile(r"\w+\.py:\d+|'\w+'")


@pytest.mark.parametrize("name", public_models.names())
def test_a_public_model(name: str) -> None:
    sample = public_models.build(name)
    outcome = measure(sample)
    assert outcome.fused == sample.fused
    assert outcome.error < TOLERANCE
    if sample.refusal:
        assert sample.refusal in outcome.refusal
        assert PLACE.search(outcome.refusal)
    else:
        assert outcome.refusal == ""
        assert outcome.tokens == outcome.wanted
