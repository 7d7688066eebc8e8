"""The text of a graph as each pass left it: what dumps, the explorer and saved programs show.

`TraceRecorder` is an instrument that `compile` always puts around the passes: printing costs a few
percent of a compilation, and whoever needs to see what a pass did needs it after the fact. A trace
is stored as one `.gir` file a step, `00_capture.gir`, `09_fuse_norm.gir`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from graphopt.errors import ProgramFormatError, VerifyError
from graphopt.files.regular_file import check_regular
from graphopt.ir.graph import Graph, namespaces_of
from graphopt.ir.text.parser import GraphReader, first_difference
from graphopt.ir.text.printer import print_graph
from graphopt.record.diff import collapsed_diff
from graphopt.record.report import PassRecord, Report

CAPTURE = "capture"
_FILE = re.compile(r"(\d{2,})_(\w+)\.gir")


@dataclass(frozen=True, slots=True)
class TraceStep:
    """The graph after a pass that changed it.

    number: of the pass in `Report.passes`, from 1; 0 for the captured graph. name: of the pass, or
    "capture". text: `.gir`.
    """

    number: int
    name: str
    text: str

    @property
    def file(self) -> str:
        """`09_fuse_norm.gir`."""
        return f"{self.number:02d}_{self.name}.gir"


@dataclass(frozen=True, slots=True)
class Trace:
    """The steps of one compilation: the captured graph first, then each pass that changed it."""

    steps: tuple[TraceStep, ...] = ()

    def diff(self, number: int) -> str:
        """The collapsed diff of a pass by its number in the report, "" when it changed nothing."""
        for before, after in zip(self.steps, self.steps[1:], strict=False):
            if after.number == number:
                return collapsed_diff(before.text, after.text, before.file, after.file)
        return ""

    def write(self, folder: Path) -> None:
        """One file a step."""
        folder.mkdir(parents=True, exist_ok=True)
        for step in self.steps:
            (folder / step.file).write_text(step.text, encoding="utf-8")


def read_trace(folder: Path) -> Trace:
    """The steps that lie in a folder. Raises ProgramFormatError for a file that is no text."""
    steps = []
    for path in sorted(folder.glob("*.gir")):
        match = _FILE.fullmatch(path.name)
        if match:
            check_regular(path, ProgramFormatError)
            try:
                steps.append(TraceStep(int(match[1]), match[2], path.read_text(encoding="utf-8")))
            except (UnicodeDecodeError, OSError) as error:
                raise ProgramFormatError(f"{path} is damaged: {error!r}") from error
    return Trace(tuple(sorted(steps, key=lambda step: step.number)))


class Named(Protocol):
    """A pass, as far as a record of it goes."""

    @property
    def name(self) -> str:
        """Unique among passes."""


class TraceRecorder:
    """Instrument: prints the graph after every pass that changed it.

    report: of the same run. is_checked: read every text back and compare it with the graph.
    listener: told of each step as it is made, and of the one before.
    """

    def __init__(
        self,
        report: Report,
        *,
        is_checked: bool = False,
        listener: Callable[[TraceStep, TraceStep | None], None] | None = None,
    ) -> None:
        self._report, self._listener = report, listener
        self._steps: list[TraceStep] = []
        self._reader = GraphReader() if is_checked else None
        self.running = ""
        """Name of the pass that is running, or that raised."""

    @property
    def trace(self) -> Trace:
        """What was recorded so far."""
        return Trace(tuple(self._steps))

    def captured(self, graph: Graph) -> None:
        """The graph before the first pass."""
        self.record(CAPTURE, graph)

    def before(self, pass_: Named, graph: Graph) -> None:
        """The text after the previous pass is the text before this one."""
        del graph
        self.running = pass_.name

    def after(self, pass_: Named, graph: Graph, record: PassRecord) -> None:
        """Print the graph. A pass that applied nothing and removed nothing is not asked."""
        del pass_
        self.running = ""
        if record.has_changes:
            self.record(record.name, graph)

    def record(self, name: str, graph: Graph) -> None:
        """Add the graph as a step, if its text is another than before."""
        text = print_graph(graph)
        previous = self._steps[-1] if self._steps else None
        if previous is not None and previous.text == text:
            return
        if self._reader is not None:
            check_round_trip(graph, text, name, self._reader)
        self._steps.append(TraceStep(len(self._report.passes), name, text))
        if self._listener is not None:
            self._listener(self._steps[-1], previous)


def check_round_trip(graph: Graph, text: str, name: str, reader: GraphReader | None = None) -> None:
    """Raise VerifyError when `text` does not read back as `graph`. reader: of the texts before."""
    reader = reader or GraphReader()
    try:
        again = reader.read(text, graph.weights, graph.packed, namespaces_of(graph))
    except ProgramFormatError as error:
        raise VerifyError(f"after {name}: the graph text does not read back: {error}") from error
    difference = first_difference(graph, again)
    if difference is not None:
        raise VerifyError(f"after {name}: the graph text reads back differently: {difference}")
