"""The mutation sampler: which changes it makes, which tests it picks, what it finds."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.append(str(ROOT))

from tools.mutation import reach, sources  # noqa: E402
from tools.mutation.operators import Mutant, is_code, mutants  # noqa: E402
from tools.mutation.probes import HITS, probed  # noqa: E402

SOURCE = '''"""A file."""

NAMES = ("a", "b")


def found(x: int, y: int = 3) -> int:
    """What it says."""
    total = x - y
    if x <= 2 or not y:
        return 0
    total = max(total, 1)
    print(f"{x - 1}")
    if any(n in ("p", "q") for n in NAMES):
        raise ValueError("1 < 2")
    return total
'''
CHANGES = {
    "comparison": {"x <= 2 -> x > 2", "x <= 2 -> x < 2", "n in ('p', 'q') -> n not in ('p', 'q')"},
    "not": {"not y -> y"},
    "junction": {"x <= 2 or not y -> (not y)", "x <= 2 or not y -> (x <= 2)"},
    "condition": {
        "x <= 2 or not y -> True",
        "x <= 2 or not y -> False",
        "any((n in ('p', 'q') for n in NAMES)) -> True",
        "any((n in ('p', 'q') for n in NAMES)) -> False",
    },
    "integer": {"2 -> 3", "2 -> 1", "0 -> 1", "0 -> -1", "1 -> 2", "1 -> 0"},
    "arguments": {"max(total, 1) -> max(1, total)"},
    "operands": {"x - y -> y - x"},
    "statement": {"total = max(total, 1) removed", "print(f'{x - 1}') removed"},
    "function": {"max -> min", "any -> all"},
    "element": {"without 'a'", "without 'b'", "without 'p'", "without 'q'"},
}


def all_of(source: str) -> list[Mutant]:
    return [m for m in mutants("file.py", source) if is_code(m, source)]


def test_every_kind_of_change() -> None:
    made: dict[str, set[str]] = {}
    for mutant in all_of(SOURCE):
        made.setdefault(mutant.kind, set()).add(mutant.change.replace("(-1)", "-1"))
        changed = mutant.apply(SOURCE)
        assert changed != SOURCE
        compile(changed, "file.py", "exec")
        assert mutant.line_text == SOURCE.splitlines()[mutant.line - 1].strip()
    assert made == CHANGES


def test_a_mutant_keeps_its_name_when_lines_move() -> None:
    moved = SOURCE.replace('"""A file."""', '"""A file."""\n\nimport os\n# é\n')
    before = [(m.line_text, m.change, m.statement) for m in all_of(SOURCE)]
    assert [(m.line_text, m.change, m.statement) for m in all_of(moved)] == before


def test_probes_tell_which_statements_run() -> None:
    HITS.clear()
    space: dict[str, object] = {}
    exec(probed("file.py", HITS)(SOURCE), space)
    assert not HITS
    assert space["found"](9) == 6  # type: ignore[operator]
    assert "file.py:found:total = max(total, 1)" in HITS
    assert "file.py:found:return 0" not in HITS
    wanted = {f"file.py:{m.statement}" for m in all_of(SOURCE) if m.scope}
    assert wanted - HITS == {"file.py:found:return 0"}
    HITS.clear()


def a_test(name: str, seconds: float, *hits: str, own: int = 1) -> reach.Test:
    return reach.Test(name, seconds, frozenset(hits), own)


def test_the_nearest_and_quickest_tests_come_first() -> None:
    (mutant, *_) = [m for m in all_of(SOURCE) if m.kind == "function"]
    mutant = replace(mutant, path="a/masks/bits.py")
    hit = f"a/masks/bits.py:{mutant.statement}"
    tests = [
        a_test("tests/other/test_x.py::far", 0.1, hit),
        a_test("tests/masks/test_bits.py::slow", 9.0, hit),
        a_test("tests/masks/test_bits.py::quick", 0.2, hit, own=2),
        a_test("tests/masks/test_bits.py::small", 0.3, hit, own=1),
        a_test("tests/masks/test_bits.py::elsewhere", 0.1, "a/masks/bits.py:other:pass"),
    ]
    names = [test.name.split("::")[1] for test in reach.reaching(mutant, SOURCE, tests)]
    assert names == ["small", "quick", "slow", "far"]
    # A table is there for all tests.
    (table, *_) = [m for m in all_of(SOURCE) if not m.scope]
    assert len(reach.reaching(table, SOURCE, tests)) == 5


def test_every_area_has_sources_and_tests() -> None:
    for name, area in sources.AREAS.items():
        assert sources.files(name)
        assert reach.test_files([name])
        assert all((ROOT / path).exists() for path in area.tests.split())
    assert (
        sources.module_name(Path("passes/analysis/masks/bits.py"))
        == "graphopt.passes.analysis.masks.bits"
    )
    assert sources.module_name(Path("graphopt/ir/graph.py")) == "graphopt.ir.graph"


def test_the_listed_mutants_are_there() -> None:
    """An entry of equivalent.toml goes when its line goes."""
    from tools.mutation.__main__ import _known

    for (file, line, change), reason in _known().items():
        made = {(m.line_text, m.change) for m in mutants(file, (ROOT / file).read_text())}
        assert (line, change) in made, f"{file}: no such mutant: {line!r}: {change}"
        assert len(reason) > 10


@pytest.mark.parametrize("options", [["--count", "6"], ["--count", "3", "--area", "masks"]])
def test_a_seed_draws_the_same_mutants(options: list[str]) -> None:
    command = [sys.executable, "-m", "tools.mutation", "--seed", "5", "--list", *options]
    drawn = [
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1]
    assert len(drawn[0].splitlines()) == int(options[1])
