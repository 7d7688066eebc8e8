"""A small budget of every fuzzer, with a fixed seed; and the harness itself tells ends apart."""

from pathlib import Path

import pytest

from . import harness
from .harness import End

SEED = 20261126


@pytest.mark.parametrize("name", [name for name in harness.names() if name != "example"])
def test_no_case_fails(name: str, tmp_path: Path) -> None:
    count = harness.fuzzer(name).ci_count  # type: ignore[attr-defined]
    outcome = harness.run(name, SEED, range(count), failures=tmp_path / "failures")
    assert not outcome.failures, (
        outcome.describe()
        + "\n"
        + "\n".join(f"case {result.number}: {result.text}" for result in outcome.failures[:3])
    )
    assert outcome.ends[End.OK], "no case got through: the fuzzer's samples are stale"


def test_every_end_is_told_apart_and_failing_inputs_are_kept(tmp_path: Path) -> None:
    outcome = harness.run("example", 0, range(6), failures=tmp_path, limit=1.0)
    assert outcome.ends == dict.fromkeys(End, 1)
    assert outcome.operations == 8
    assert {result.end for result in outcome.failures} == {end for end in End if not end.good}
    for result in outcome.failures:
        assert (tmp_path / f"example-0-{result.number}" / "input.txt").read_text() == "kept"
