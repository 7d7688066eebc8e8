"""Draws mutants of the source and says which of them no test notices.

    python -m tools.mutation --seed 7 --count 100               the areas that rewrite and lower
    python -m tools.mutation --seed 7 --count 20 --area masks   one area (may be repeated)
    python -m tools.mutation --only 'passes/analysis/masks/bits.py:*'   a file, or one line
    python -m tools.mutation --again build/mutation/result.json         what survived that run

A mutant is one small change of a source file (`operators.py`). The tests that execute the changed
statement run against it, the nearest first, until one fails; the work tree is never changed. What
survives is either a test that is missing or a change that means the same: those are listed, with
the reason, in `equivalent.toml`. Results: `build/mutation/result.json` and a table on the standard
output; the exit status is 1 when mutants survived that are not listed.

discarded: the change fails at import, which any test would notice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from itertools import groupby
from pathlib import Path

import pytest

from tools.mutation import reach, sandbox, sources
from tools.mutation.operators import WEIGHTS, Mutant, is_code, mutants

EQUIVALENT = Path(__file__).with_name("equivalent.toml")
_COLUMNS = ("run", "equivalent", "killed", "survived", "discarded")


@dataclass(frozen=True, slots=True)
class Outcome:
    """state: one of _COLUMNS but the first. by: the test that failed, "time", the signal of a
    crash, or the reason why the mutant is equivalent."""

    area: str
    mutant: Mutant
    state: str
    by: str
    tests: int
    seconds: float


def main() -> int:
    """See the module docstring."""
    options = _options()
    folder: Path = options.result.parent.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    cache = _private_cache(folder)
    os.environ |= {"OMP_NUM_THREADS": "1", "GRAPHOPT_CACHE": str(cache), "GRAPHOPT_OFFLINE": "1"}
    if options.again:
        drawn = _survivors(options.again)
    else:
        drawn = _only(options.only) if options.only else _drawn(options)
    if options.list:
        for area, mutant in drawn:
            _say(f"{area:8} {_described(mutant)}")
        return 0
    sandbox.warm_up()
    recorded = reach.record(folder / "reach", {area for area, _ in drawn}, _say)
    known = _known()
    outcomes: list[Outcome] = []
    for number, (area, mutant) in enumerate(drawn, 1):
        started = time.monotonic()
        reason = known.get((mutant.path, mutant.line_text, mutant.change))
        if reason is None:
            state, by, count = _tried(mutant, recorded, options, folder)
        else:
            state, by, count = "equivalent", reason, 0
        outcomes.append(Outcome(area, mutant, state, by, count, time.monotonic() - started))
        _say(f"{number:4} {state:10} {outcomes[-1].seconds:5.0f} s  {_described(mutant)}  [{by}]")
        options.result.write_text(json.dumps([asdict(o) for o in outcomes], indent=1))
    _say(_table(outcomes))
    return 1 if any(o.state == "survived" for o in outcomes) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.mutation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=100, help="mutants, spread over the areas")
    parser.add_argument("--area", action="append", choices=sources.AREAS, help="may be repeated")
    parser.add_argument("--only", action="append", help="'path:line' or 'path:*', may be repeated")
    parser.add_argument("--again", type=Path, help="a result file: what survived is tried again")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds a mutant at least")
    parser.add_argument(
        "--budget", type=float, default=60.0, help="seconds of tests a mutant, the nearest first"
    )
    parser.add_argument("--result", type=Path, default=sources.ROOT / "build/mutation/result.json")
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    return parser.parse_args()


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _described(mutant: Mutant) -> str:
    return f"{mutant.path}:{mutant.line} {mutant.kind}: {mutant.change}".replace("\n", " ")[:200]


def _private_cache(folder: Path) -> Path:
    """A copy of the compiled kernels: a mutant of their build must not reach the user's."""
    from_user = Path(os.environ.get("GRAPHOPT_CACHE") or "~/.cache/graphopt").expanduser()
    cache = folder / "cache"
    if not cache.exists() and (from_user / "native").exists():
        shutil.copytree(from_user / "native", cache / "native")
    return cache


def _drawn(options: argparse.Namespace) -> list[tuple[str, Mutant]]:
    """One random stream an area, so that a further area changes nothing of the others; no two of
    one statement."""
    areas = options.area or sources.DEFAULT_AREAS
    found: list[tuple[str, Mutant]] = []
    for i, area in enumerate(areas):
        count = options.count // len(areas) + (i < options.count % len(areas))
        stream = random.Random(f"{options.seed} {area}")
        candidates = [m for path in sources.files(area) for m in _of(path)]
        weights = [WEIGHTS[m.kind] for m in candidates]
        taken: dict[tuple[str, str], Mutant] = {}
        while candidates and len(taken) < min(count, len({_where(m) for m in candidates})):
            (mutant,) = stream.choices(candidates, weights)
            if is_code(mutant, (sources.ROOT / mutant.path).read_text()):
                taken.setdefault(_where(mutant), mutant)
        found += [(area, mutant) for mutant in taken.values()]
    return found


def _where(mutant: Mutant) -> tuple[str, str]:
    # Entries of one table are different places.
    return mutant.path, mutant.statement if mutant.scope else f"{mutant.line}"


def _of(path: Path) -> list[Mutant]:
    return mutants(str(path), (sources.ROOT / path).read_text())


def _only(wanted: list[str]) -> list[tuple[str, Mutant]]:
    return [
        (area, mutant)
        for area in sources.AREAS
        for path in sources.files(area)
        for mutant in _of(path)
        if any(fnmatch(f"{path}:{mutant.line}", pattern) for pattern in wanted)
    ]


def _survivors(result: Path) -> list[tuple[str, Mutant]]:
    """Those whose line is still there."""
    wanted = [o for o in json.loads(result.read_text()) if o["state"] == "survived"]
    found: list[tuple[str, Mutant]] = []
    for old in wanted:
        name = (old["mutant"]["line_text"], old["mutant"]["change"])
        same = [m for m in _of(Path(old["mutant"]["path"])) if (m.line_text, m.change) == name]
        found += [(old["area"], mutant) for mutant in same[:1]]
    return found


def _known() -> dict[tuple[str, str, str], str]:
    listed = tomllib.loads(EQUIVALENT.read_text()).get("mutant", [])
    return {(m["file"], m["line"], m["change"]): m["reason"] for m in listed}


def _tried(
    mutant: Mutant, recorded: reach.Record, options: argparse.Namespace, folder: Path
) -> tuple[str, str, int]:
    source = (sources.ROOT / mutant.path).read_text()
    nearest = reach.reaching(mutant, source, recorded.tests)
    chosen = list(_within(nearest, options.budget))
    if not chosen:
        return "survived", "no test executes it", 0
    expected = sum(test.seconds for test in chosen)
    answer = sandbox.run(
        lambda: _against(mutant, source, chosen, recorded.known, folder),
        folder / "mutant.log",
        options.timeout + 4 * expected,
    )
    if isinstance(answer, str):
        return "killed", answer, len(chosen)
    if answer["status"] == pytest.ExitCode.OK:
        return "survived", f"{len(chosen)} of {len(nearest)} tests run", len(chosen)
    if answer["failed"]:
        return "killed", answer["failed"], len(chosen)
    if answer["at_import"]:
        return "discarded", answer["at_import"], len(chosen)
    raise SystemExit(f"pytest ended with {answer['status']}: see {folder / 'mutant.log'}")


def _within(tests: list[reach.Test], budget: float) -> Iterator[reach.Test]:
    total = 0.0
    for i, test in enumerate(tests):
        total += test.seconds
        if i and total > budget:
            return
        yield test


class _Chosen:
    """Pytest plugin: only some tests, in their order; which one failed first.

    Tests that are not known come first: they exist because of the mutant, which a test may be
    parametrised over."""

    def __init__(self, names: list[str], known: Collection[str]) -> None:
        self.order = {name: i for i, name in enumerate(names)}
        self.known = known
        self.failed = self.at_import = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """See pytest."""
        items[:] = sorted(
            (i for i in items if i.nodeid in self.order or i.nodeid not in self.known),
            key=lambda item: self.order.get(item.nodeid, -1),
        )

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """See pytest."""
        if report.failed and not self.failed:
            self.failed = report.nodeid

    @pytest.hookimpl
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """See pytest."""
        if report.failed:
            self.at_import = self.at_import or report.nodeid


def _against(
    mutant: Mutant, source: str, tests: list[reach.Test], known: Collection[str], folder: Path
) -> dict[str, object]:
    changed = mutant.apply(source)
    sources.Hook({mutant.path: lambda _: compile(changed, mutant.path, "exec")}).install()
    chosen = _Chosen([test.name for test in tests], known)
    where = folder / "tmp" / str(os.getpid())
    where.mkdir(parents=True, exist_ok=True)
    status = 0
    try:
        # Collecting files takes its time, too: those that are less near only when need be.
        for _, ring in groupby(tests, lambda test: reach.nearness(mutant.path, test.file)):
            files = list(dict.fromkeys(test.file for test in ring))
            arguments = sandbox.pytest_arguments(files, where)
            status = status or int(pytest.main(["-x", *arguments], plugins=[chosen]))
    except Exception as error:
        # conftest.py or a plugin could not be imported.
        return {"status": 1, "failed": "", "at_import": repr(error)}
    finally:
        shutil.rmtree(where, ignore_errors=True)
    return {"status": status, "failed": chosen.failed, "at_import": chosen.at_import}


def _table(outcomes: list[Outcome]) -> str:
    lines = [f"{'area':10}" + "".join(f"{c:>12}" for c in _COLUMNS) + f"{'kill rate':>12}"]
    areas = list(dict.fromkeys(o.area for o in outcomes))
    for area in [*areas, "all"]:
        states = Counter(o.state for o in outcomes if area in (o.area, "all"))
        states["run"] = states["equivalent"] + states["killed"] + states["survived"]
        decided = states["killed"] + states["survived"]
        rate = f"{states['killed'] / decided:.0%}" if decided else "-"
        cells = "".join(f"{states[c]:12}" for c in _COLUMNS)
        lines.append(f"{area:10}{cells}{rate:>12}")
    survivors = [o for o in outcomes if o.state == "survived"]
    lines += [f"survived: {_described(o.mutant)}  [{o.by}]" for o in survivors]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
