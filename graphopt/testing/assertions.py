"""For the tests of programs and passes: counts that must be reached, graphs kept as golden files.

    expect(program, fuse_attention=30, fuse_norm=61)
    golden_graph.rewrite(graph, "fuse_norm", "my_norm")

Nothing here needs pytest; with it, `graphopt_pytest.py` gives tests a `GoldenGraph` as the fixture
`golden_graph`, and `pytest --accept` writes the files. `golden.py` says what they hold.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from graphopt.check.expect import check_counts, check_names
from graphopt.check.golden import (
    difference,
    golden_text,
    read_golden,
    read_sections,
    shown,
    structure,
)
from graphopt.check.twin import check_twin
from graphopt.errors import (
    ExpectationError,
    GoldenError,
    PassError,
    ProgramFormatError,
    UnsupportedError,
)
from graphopt.files.paths import as_path
from graphopt.ir.graph import Graph, namespaces_of
from graphopt.ir.text.printer import canonical_text
from graphopt.ir.verify import verify
from graphopt.ir.weights import PackedWeight
from graphopt.passes.base import Pass, run_pass
from graphopt.passes.registry import find
from graphopt.program.program import Program
from graphopt.record.report import Rejection, Report, Site, grouped

__all__ = ["ExpectationError", "GoldenError", "GoldenGraph", "expect"]

Use = tuple[str, str, bool]
"""One golden file in a run: digest of the graph that a test brought ("" for none: it was only
replayed), that test, and whether the file was written. Plain values, because pytest's workers send
them to each other."""

_NAME = re.compile(r"\w[\w.-]*")


def expect(
    subject: Program | Graph | Report, counts: Mapping[str, int] | None = None, /, **more: int
) -> None:
    """Check that passes applied so many rewrites, and that the graph holds so many of an op.

    subject: a program, compiled or loaded; a graph that passes were run on; or a report.
    counts, more: as `expect=` of `compile`: {"fuse_norm": 61, "graphopt.rms_norm": 61}; names of
        passes can be given as keywords.
    Raises ExpectationError (an AssertionError) with every count that differs and the reason of the
    first rejection; PassError for a name that is no op or pass, a pass that did not run, and
    nothing to expect; UnsupportedError for other subjects, and for ops of a report.
    """
    __tracebackhide__ = True
    twice = sorted(set(counts or {}) & set(more))
    if twice:
        raise PassError(f"expect is given {twice[0]!r} twice")
    wanted = {**(counts or {}), **more}
    if not wanted:
        raise PassError("expect is given no counts: expect(program, fuse_norm=61)")
    graph, serving = None, None
    if isinstance(subject, Program):
        graph, serving, report = subject.graph, subject.serving, subject.report
    elif isinstance(subject, Graph):
        graph, report = subject, Report(passes=list(subject.records))
    elif isinstance(subject, Report):
        report = subject
    else:
        raise UnsupportedError(
            f"expect takes a Program, a Graph or a Report, not a {type(subject).__name__}"
        )
    check_names(wanted, {record.name for record in report.passes})
    check_counts(wanted, graph, serving, report)


class GoldenGraph:
    """Compares graphs with golden files.

    folder: of the files `<name>.gir`. accept: write files that are missing or differ.
    how: how the reader of an error accepts the change. test: who compares, for messages.
    uses: the files compared so far in this run, by path; one name stands for one graph.

    All methods raise GoldenError (an AssertionError) with a diff when the structures differ, and
    for files that are missing or do not parse, with their line.
    """

    def __init__(
        self,
        folder: Path,
        *,
        accept: bool = False,
        how: str = "GoldenGraph(folder, accept=True)",
        test: str = "this test",
        uses: dict[str, Use] | None = None,
    ) -> None:
        self.folder = as_path(folder, GoldenError)
        self._accept, self._how, self._test = accept, how, test
        self._uses = {} if uses is None else uses

    def __call__(
        self,
        subject: Graph | Program,
        name: str,
        *,
        form: Literal["forward", "serving"] | None = None,
    ) -> None:
        """Compare a graph, or a program's graph, with `<name>.gir`.

        form: which graph of a program, its forward by default; a Graph has one form only.
        """
        __tracebackhide__ = True
        self._settle(name, [_graph_of(subject, form)], "")

    def rewrite(self, graph: Graph, pass_: str | type[Pass[Any]], name: str) -> Graph:
        """Run one pass on a copy; compare the graph before and the graph after with `<name>.gir`.

        The pass, a registered name or a class, must apply a rewrite, apply nothing when it is run
        again, leave a graph that the verifier accepts, and compute the same up to its tier
        (`numeric_twin.py`). Returns the graph after.
        """
        __tracebackhide__ = True
        if not isinstance(graph, Graph):
            raise UnsupportedError(f"rewrite takes a Graph, not a {type(graph).__name__}")
        cls = _pass_class(pass_)
        after = rewritten(graph, cls)
        self._settle(name, [graph, after], cls.name)
        return after

    def replay(
        self,
        name: str,
        pass_: str | type[Pass[Any]],
        *,
        weights: Mapping[str, Tensor] | None = None,
        packed: Mapping[str, PackedWeight] | None = None,
    ) -> Graph:
        """Run one pass on the graph that `<name>.gir` holds as its first section, and compare the
        result with the second, as `rewrite` does. No model and no capture are needed.

        weights: data for weights whose values the pass reads; the others hold random numbers, the
        same in every run. packed: as `Graph.packed`. When the file has no second section yet,
        accepting writes it, so that the graph before may be written by hand. Returns the result.
        """
        __tracebackhide__ = True
        cls, path = _pass_class(pass_), self._path(name)
        if not path.exists():
            raise GoldenError(
                f"{shown(path)} does not exist: write the graph before the pass into it, or make "
                "it with golden_graph.rewrite(graph, pass, name)"
            )
        golden = read_golden(path)
        try:
            before = golden.graph(0, weights, packed)
        except ProgramFormatError as error:
            raise GoldenError(f"{shown(path)}: {error}") from error
        for kind, given in (("weights", weights), ("packed", packed)):
            for weight in given or {}:
                if weight not in before.weights:
                    raise GoldenError(f"{kind} has {weight!r}, which {shown(path)} does not name")
        after = rewritten(before, cls)
        self._settle(name, [before, after], cls.name, is_replay=True)
        return after

    def _path(self, name: str) -> Path:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise GoldenError(f"{name!r} is no name: use letters, digits, '_', '-' and '.'")
        return self.folder / f"{name}.gir"

    def _settle(
        self, name: str, graphs: Sequence[Graph], pass_name: str, is_replay: bool = False
    ) -> None:
        """Compare, and write or raise when something differs."""
        __tracebackhide__ = True
        path = self._path(name)
        problem, kept = _problem(path, graphs, pass_name)
        clash = self._claim(path, "" if is_replay else _digest(graphs, pass_name))
        if not problem:
            return
        if not self._accept:
            raise GoldenError("\n".join([problem, *clash, f"to accept this graph: {self._how}"]))
        if clash:
            raise GoldenError(clash[0])
        if is_replay and not kept[0]:
            raise GoldenError(f"{shown(path)} changed while it was replayed: run this test again")
        texts = [old or canonical_text(new) for old, new in zip(kept, graphs, strict=True)]
        _write(path, golden_text(texts, pass_name))
        digest, test, _ = self._uses[str(path)]
        self._uses[str(path)] = (digest, test, True)

    def _claim(self, path: Path, digest: str) -> list[str]:
        """Note the use of a file; a sentence when another graph uses it."""
        known, test, written = self._uses.get(str(path), ("", self._test, False))
        if known and digest not in ("", known):
            return [
                f"{shown(path)} is used by {test} and by {self._test} for different graphs: "
                "give each its own name"
            ]
        self._uses[str(path)] = (known or digest, test if known else self._test, written)
        return []


def _digest(graphs: Sequence[Graph], pass_name: str) -> str:
    text = golden_text([structure(graph) for graph in graphs], pass_name)
    return hashlib.sha256(text.encode()).hexdigest()


def rewritten(graph: Graph, cls: type[Pass[Any]]) -> Graph:
    """A copy of `graph` after one run of the pass.

    Raises GoldenError when it applies nothing, applies something the second time as well, or
    changes numbers by more than its tier allows, and VerifyError when it leaves a broken graph.
    """
    after = graph.copy()
    sites, why = _run(cls, after)
    if not sites:
        raise GoldenError(f"{cls.name} did not fire on graph {graph.name!r}: {why}")
    verify(after, after=cls.name)
    again = after.copy()
    sites, _ = _run(cls, again)
    changes = difference(after, again, "after one run", "after two runs")
    if sites or changes:
        again_text = f"a second run applied more rewrites ({sites})"
        raise GoldenError(f"{cls.name} is not idempotent: {again_text}\n{changes}".rstrip())
    check_twin(cls(), graph, after)
    return after


def _run(cls: type[Pass[Any]], graph: Graph) -> tuple[int, str]:
    """(rewrites applied, why candidates were left alone)."""
    results = [candidate.result for candidate in run_pass(cls(), graph)]
    reasons = grouped([result for result in results if isinstance(result, Rejection)])
    why = "; ".join(reason for reason, _ in reasons) or "it has no candidates"
    return sum(isinstance(result, Site) for result in results), why


def _pass_class(pass_: str | type[Pass[Any]]) -> type[Pass[Any]]:
    if isinstance(pass_, str):
        return find(pass_)
    if isinstance(pass_, type) and issubclass(pass_, Pass):
        return pass_
    raise PassError(f"{pass_!r} is neither the name of a pass nor a Pass class")


def _graph_of(subject: Graph | Program, form: str | None) -> Graph:
    if isinstance(subject, Graph):
        if form is not None:
            raise UnsupportedError(f"form={form!r} has no effect on a Graph: leave it out")
        return subject
    if not isinstance(subject, Program):
        raise UnsupportedError(
            f"a golden graph is a Graph or a Program, not a {type(subject).__name__}"
        )
    if form not in (None, "forward", "serving"):
        raise UnsupportedError(f"form={form!r} is not supported; supported: 'forward', 'serving'")
    if form != "serving":
        return subject.graph
    # Raises RowDependenceError with the reason when there is none.
    _ = subject.executable
    assert subject.serving is not None
    return subject.serving


def _problem(path: Path, found: Sequence[Graph], pass_name: str) -> tuple[str, list[str]]:
    """(what is wrong with the file, "" for nothing; its sections that are right, else "")."""
    kept = [""] * len(found)
    if not path.exists():
        return f"{shown(path)} does not exist", kept
    try:
        golden = read_golden(path)
        old = read_sections(golden, path, set().union(*map(namespaces_of, found)))
    except GoldenError as error:
        return str(error), kept
    for index, (theirs, ours) in enumerate(zip(old, found, strict=False)):
        if structure(theirs) == structure(ours):
            kept[index] = golden.sections[index]
    if (golden.pass_name, len(old)) != (pass_name, len(found)):
        return (
            f"{shown(path)} holds {_kind(golden.pass_name)}, the test compares {_kind(pass_name)}",
            kept,
        )
    titles = [""] if len(found) == 1 else [" (before)", f" (after {pass_name})"]
    changes = [
        difference(theirs, ours, f"{shown(path)}{title}", f"found{title}")
        for theirs, ours, title in zip(old, found, titles, strict=True)
    ]
    if not any(changes):
        return "", kept
    return "\n".join([f"the graph is not what {shown(path)} holds", *filter(None, changes)]), kept


def _kind(pass_name: str) -> str:
    return f"a graph before and after {pass_name}" if pass_name else "one graph"


def _write(path: Path, text: str) -> None:
    """All or nothing: another process may be reading or writing the same file. Raises GoldenError
    when it cannot be written."""
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise GoldenError(f"{shown(path)} could not be written: {error}") from error
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
