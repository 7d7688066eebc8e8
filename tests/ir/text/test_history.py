"""History as text."""

from __future__ import annotations

import pytest

from graphopt.ir.text.history import read_history, write_history


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["%2"], "%2"),
        (["%18", "%2", "%17", "%19"], "%2, %17-19"),
        (["%9", "%10", "fuse_norm#10", "fuse_norm#2"], "%9-10, fuse_norm#2, fuse_norm#10"),
        (["cleanup#0", "@norm.weight", "%ids", "%3"], "%3, %ids, @norm.weight, cleanup#0"),
    ],
)
def test_one_text_for_one_set(names: list[str], text: str) -> None:
    assert write_history(names) == text
    assert write_history(reversed(names)) == text
    assert read_history(text) == frozenset(names)


def test_a_range_that_would_fill_memory_is_a_name() -> None:
    assert read_history("%0-99999999999") == {"%0-99999999999"}
