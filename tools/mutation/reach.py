"""Which tests to run for a mutant: those that execute its statement, the nearest first.

A record of one test file says what its tests execute of the areas' files; it is kept, and made anew
when the test file has changed, or an area has other files. Statements are named by their text, so
an edited source needs no new record: a statement that no test knows is looked for by its function.

What stands at module level (a table) every test executes that imports the module: all of them, the
nearest first.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tools.mutation import probes, sandbox, sources
from tools.mutation.operators import Mutant

_SECONDS_TO_RECORD = 1800.0
_SLOW_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Test:
    """A test, how long it takes, and the statements it executes ("path:scope:text")."""

    name: str
    seconds: float
    hits: frozenset[str]
    own: int

    @property
    def file(self) -> str:
        """Its test file."""
        return self.name.split("::")[0]


@dataclass(frozen=True, slots=True)
class Record:
    """tests: those that pass. known: names of all, also of what fails without a mutant."""

    tests: tuple[Test, ...]
    known: frozenset[str]


def record(folder: Path, areas: Iterable[str], say: Callable[[str], None]) -> Record:
    """All tests for the areas; records the files that are new or have changed since."""
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Test] = []
    failed: list[str] = []
    probed = [str(file) for area in sources.AREAS for file in sources.files(area)]
    for path in test_files(areas):
        text = (sources.ROOT / path).read_bytes() + "\n".join(probed).encode()
        kept = folder / (path.replace("/", "-").removesuffix(".py") + ".json")
        digest = hashlib.sha256(text).hexdigest()
        data = json.loads(kept.read_text()) if kept.exists() else {}
        if data.get("digest") != digest:
            say(f"recording {path}")
            log = kept.with_suffix(".log")
            work = functools.partial(_recorded, path, probed, folder)
            data = sandbox.run(work, log, _SECONDS_TO_RECORD)
            if isinstance(data, str):
                raise SystemExit(f"{path} could not be recorded ({data}); its output: {log}")
            data["digest"] = digest
            kept.write_text(json.dumps(data))
        failed += data["failed"]
        keys, shared = data["keys"], [data["keys"][i] for i in data["shared"]]
        for name, (seconds, hits) in data["tests"].items():
            statements = frozenset([*(keys[i] for i in hits), *shared])
            found.append(Test(name, seconds, statements, len(hits)))
    for name in failed:
        say(f"fails without a mutant, and is left out: {name}")
    return Record(tuple(found), frozenset([*(test.name for test in found), *failed]))


def test_files(areas: Iterable[str]) -> list[str]:
    """Relative to the root; each once."""
    found: dict[str, None] = {}
    for name in (name for area in areas for name in sources.AREAS[area].tests.split()):
        path = sources.ROOT / name
        for file in sorted(path.rglob("test_*.py")) if path.is_dir() else [path]:
            found[str(file.relative_to(sources.ROOT))] = None
    return list(found)


def _recorded(path: str, probed: Iterable[str], folder: Path) -> dict[str, Any]:
    hits = probes.HITS
    sources.Hook({file: probes.probed(file, hits) for file in probed}).install()
    recorder = probes.Recorder()
    where = folder / "tmp" / str(os.getpid())
    where.mkdir(parents=True, exist_ok=True)
    pytest.main(sandbox.pytest_arguments([path], where), plugins=[recorder])
    good = {k: v for k, v in recorder.tests.items() if k not in recorder.failed}
    keys = sorted(recorder.shared.union(*(hits for _, hits in good.values())))
    index = {key: i for i, key in enumerate(keys)}
    return {
        "keys": keys,
        "shared": [index[k] for k in sorted(recorder.shared)],
        "failed": sorted(recorder.failed),
        "tests": {
            name: (round(seconds, 3), [index[k] for k in sorted(hits)])
            for name, (seconds, hits) in good.items()
        },
    }


def reaching(mutant: Mutant, source: str, tests: Iterable[Test]) -> list[Test]:
    """The tests that execute the mutant's statement, the nearest first."""
    wanted = {f"{mutant.path}:{mutant.statement}"}
    tests = list(tests)
    found = [test for test in tests if test.hits & wanted]
    if not _is_function(mutant, source):
        found = tests
    elif not found:
        function = f"{mutant.path}:{mutant.scope}:"
        found = [t for t in tests if any(hit.startswith(function) for hit in t.hits)]
    return sorted(found, key=lambda test: _order(mutant.path, test))


def _order(path: str, test: Test) -> tuple[float, ...]:
    """Nearest first, then quick ones, then those that execute little else."""
    return -nearness(path, test.file), test.seconds > _SLOW_SECONDS, test.own, test.seconds


def _is_function(mutant: Mutant, source: str) -> bool:
    scope = mutant.scope.split(".")[-1]
    return any(
        isinstance(node, ast.FunctionDef) and node.name == scope
        for node in ast.walk(ast.parse(source))
    )


def nearness(path: str, test_file: str) -> float:
    """How much a test file is named like a source file."""
    own, others = Path(path), Path(test_file)
    words = _words(own.stem) | _words(own.parent.name)
    shared = len(words & _words(others.stem)) / len(words)
    folders = set(own.parts[:-1]) & set(others.parts[:-1])
    return 2 * shared + len(folders)


def _words(stem: str) -> set[str]:
    return {word.rstrip("s") for word in re.split(r"[_\W]+", stem) if word and word != "test"}
