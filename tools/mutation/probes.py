"""Which statements each test executes: probes in the sources, and a pytest plugin that reads them.

What a file's collection and the setup of its tests execute (helpers at module level, fixtures that
tests share) counts for every test of the file, whichever happened to run first.
"""

from __future__ import annotations

import ast
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from types import CodeType

import pytest

from tools.mutation.operators import statement_key

_PROBE = "__probe__"


def probed(path: str, hits: set[str]) -> Callable[[str], CodeType]:
    """Compiles a file so that each statement of a function adds `path:key` to `hits`."""

    def code(source: str) -> CodeType:
        tree = ast.parse(source)
        _insert(tree.body, "", path, inside=False)
        names = ast.parse(f"{_PROBE} = None").body
        first = 1 if ast.get_docstring(tree) is not None else 0
        while first < len(tree.body) and isinstance(tree.body[first], ast.ImportFrom):
            first += 1
        names = ast.parse("from tools.mutation.probes import HITS as __probe_hits__").body
        names += ast.parse(f"{_PROBE} = __probe_hits__.add").body
        tree.body[first:first] = names
        return compile(ast.fix_missing_locations(tree), path, "exec")

    assert hits is HITS
    return code


HITS: set[str] = set()
"""What was executed since it was last cleared; of a process that only records."""


def _insert(body: list[ast.stmt], scope: str, path: str, inside: bool) -> None:
    made: list[ast.stmt] = []
    for i, statement in enumerate(body):
        is_docstring = i == 0 and isinstance(statement, ast.Expr)
        is_docstring = is_docstring and isinstance(statement.value, ast.Constant)  # type: ignore[attr-defined]
        if inside and not is_docstring:
            key = repr(f"{path}:{statement_key(scope, statement)}")
            probe = ast.parse(f"{_PROBE}({key})").body[0]
            for node in ast.walk(probe):
                ast.copy_location(node, statement)
            made.append(probe)
        made.append(statement)
        inner, is_inside = scope, inside
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inner = f"{scope}.{statement.name}" if scope else statement.name
            is_inside = not isinstance(statement, ast.ClassDef)
        elif not inside:
            continue
        for field_name in ("body", "orelse", "finalbody"):
            if getattr(statement, field_name, None):
                _insert(getattr(statement, field_name), inner, path, is_inside)
        for handler in getattr(statement, "handlers", []):
            _insert(handler.body, inner, path, is_inside)
        for case in getattr(statement, "cases", []):
            _insert(case.body, inner, path, is_inside)
    body[:] = made


@dataclass
class Recorder:
    """Pytest plugin. tests: name -> (seconds, statements); shared: statements of all tests."""

    tests: dict[str, tuple[float, set[str]]] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)

    @pytest.hookimpl
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Of imports and module-level code."""
        del session
        self.shared |= HITS
        HITS.clear()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        """Fixtures."""
        del item
        HITS.clear()
        result = yield
        self.shared |= HITS
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """The test itself."""
        HITS.clear()
        started = time.perf_counter()
        try:
            return (yield)
        finally:
            self.tests[item.nodeid] = time.perf_counter() - started, set(HITS)

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Tests that fail without a mutant tell nothing."""
        if report.failed:
            self.failed.add(report.nodeid)
