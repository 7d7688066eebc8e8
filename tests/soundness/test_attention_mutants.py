"""Every mutant of an attention: equal to the model, and recorded with a code and a line."""

from __future__ import annotations

import pytest
from every_mutant import KINDS
from judge import assert_sound, batches, judge

BATCHES = batches(KINDS["attention"])


@pytest.mark.parametrize("batch", range(len(BATCHES)))
def test_mutants(batch: int) -> None:
    assert_sound(judge(BATCHES[batch]))
