"""The pytest plugin: fixture `golden_graph`, option `--accept`, ini option `golden_graphs`.

    golden_graph             a `graphopt.testing.GoldenGraph` over the folder `golden` beside the
                             test file, or over the one folder that `golden_graphs` names
    pytest --accept          writes golden graphs that are missing or differ, and lists them
    pytest -p no:graphopt    leaves the plugin out

pytest imports this module in every project of an environment that has graphopt, so it stands
outside the package, whose import brings torch: nothing of graphopt is imported before a test asks
for the fixture. Under pytest-xdist the workers send what they used to the process that prints the
summary.
"""

from __future__ import annotations

import os.path
import shlex
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from graphopt.testing import GoldenGraph, Use

_KEY = "graphopt_golden_graphs"


class _Run:
    """The golden files used in one run of pytest, in this process or in its workers.

    uses: by path. clashes: a sentence for each name that stands for two graphs in two workers.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.uses: dict[str, Use] = {}
        self.clashes: list[str] = []
        self.is_partial = False

    def merge(self, theirs: dict[str, Use], is_partial: bool) -> None:
        """Take over what a worker used."""
        self.is_partial |= is_partial
        for path, (digest, test, written) in theirs.items():
            known, first, before = self.uses.get(path, ("", test, False))
            if known and digest not in ("", known):
                self.clashes.append(
                    f"{_shown(path)} is used by {first} and by {test} for different graphs: "
                    "give each its own name"
                )
            self.uses[path] = (known or digest, first if known else test, before or written)

    def unused(self) -> list[str]:
        """Files in the folders of this run that no test used; none when not every test of those
        folders ran."""
        if self.is_partial or self.config.option.keyword or self.config.option.markexpr:
            return []
        places = [Path(argument).resolve() for argument in self.config.args]
        used: dict[Path, set[str]] = defaultdict(set)
        for path in self.uses:
            used[Path(path).parent].add(Path(path).name)
        return [
            str(file)
            for folder, names in used.items()
            if any(folder.resolve().is_relative_to(place) for place in places)
            for file in sorted(folder.glob("*.gir"))
            if file.name not in names
        ]


_RUN = pytest.StashKey[_Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--accept` and `golden_graphs`."""
    group = parser.getgroup("graphopt", "golden graphs")
    group.addoption(
        "--accept",
        action="store_true",
        dest="accept_golden_graphs",
        help="write golden graphs that are missing or differ",
    )
    parser.addini(
        "golden_graphs",
        "folder of all golden graphs, from the folder of the ini file; default: `golden` beside "
        "each test file",
        default="",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Nothing was used yet."""
    config.stash[_RUN] = _Run(config)


@pytest.fixture
def golden_graph(request: pytest.FixtureRequest) -> GoldenGraph:
    """Compares graphs with golden files; see `graphopt.testing.GoldenGraph`."""
    from graphopt.testing import GoldenGraph

    config = request.config
    test = request.node.nodeid
    here = os.path.relpath(request.path, config.invocation_params.dir)
    named = "::".join([Path(here).as_posix(), *test.split("::")[1:]])
    return GoldenGraph(
        _folder(request),
        accept=config.option.accept_golden_graphs,
        how=f"pytest {shlex.quote(named)} --accept",
        test=test,
        uses=config.stash[_RUN].uses,
    )


def _folder(request: pytest.FixtureRequest) -> Path:
    config = request.config
    chosen = str(config.getini("golden_graphs"))
    if not chosen:
        return Path(request.path.parent / "golden")
    base = config.inipath.parent if config.inipath else config.rootpath
    return base / chosen


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Remember that not every test runs, so that no golden file is called unused."""
    for item in items[:1]:
        item.config.stash[_RUN].is_partial = True


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker sends what it used; elsewhere a name for two graphs fails the run."""
    run = session.config.stash[_RUN]
    if session.shouldstop or session.shouldfail or session.exitstatus not in (0, 1):
        run.is_partial = True
    sent: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if sent is not None:
        sent[_KEY] = (run.uses, run.is_partial)
    elif run.clashes and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist has finished, or died without sending anything."""
    run = node.config.stash[_RUN]
    run.merge(*getattr(node, "workeroutput", {}).get(_KEY, ({}, True)))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Names that clash; with `--accept` what was written, and what no test used."""
    run = config.stash[_RUN]
    if run.clashes or config.option.accept_golden_graphs:
        terminalreporter.section("golden graphs")
    for clash in run.clashes:
        terminalreporter.line(clash, red=True)
    if not config.option.accept_golden_graphs:
        return
    written = sorted(path for path, (_, _, is_written) in run.uses.items() if is_written)
    for path in written:
        terminalreporter.line(f"written: {_shown(path)}")
    for path in run.unused():
        terminalreporter.line(f"used by no test: {_shown(path)}")
    terminalreporter.line(
        f"{len(written)} golden graph{'' if len(written) == 1 else 's'} written, "
        f"{len(run.uses) - len(written)} unchanged"
    )


def _shown(path: str) -> str:
    return os.path.relpath(path)
