"""Editing the graph by hand between two passes.

The text of the graph after a pass is handed to a function; what it returns is parsed, verified and
compiled on. In the report and the trace an edit is a step of its own, called "edit".
"""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, cast

from graphopt.errors import ProgramFormatError, VerifyError
from graphopt.ir.graph import Graph, namespaces_of
from graphopt.ir.text.parser import parse_graph
from graphopt.ir.text.printer import print_graph
from graphopt.ir.verify import verify
from graphopt.passes.base import Pass
from graphopt.record.report import PassRecord, Report
from graphopt.record.trace import TraceRecorder

Edit = Callable[[str], str] | Callable[[str, str], str]
"""text -> text, or (text, error) -> text, which is called again with its own text and the error
while that cannot be read; it may raise to give up. Text that was not changed is no edit."""

Asked = Callable[[str, str], Any]
"""An edit that takes both."""

NAME = "edit"


def as_asked(function: Any) -> Asked | None:
    """An Edit as one that takes both arguments, a second try of a text alone changing nothing; None
    for what takes neither one nor two arguments."""
    try:
        signature = inspect.signature(function)
    # Not callable, or written in C and without a signature.
    except (TypeError, ValueError):
        return None
    if _takes(signature, "text", "error"):
        return cast(Asked, function)
    if _takes(signature, "text"):
        return lambda text, error: text if error else function(text)
    return None


def _takes(signature: inspect.Signature, *given: str) -> bool:
    try:
        signature.bind(*given)
    except TypeError:
        return False
    return True


class EditAfter:
    """Instrument. edits: pass name -> what edits the graph after it."""

    def __init__(self, edits: Mapping[str, Asked], report: Report, recorder: TraceRecorder) -> None:
        self._edits, self._report, self._recorder = edits, report, recorder

    def before(self, pass_: Pass[Any], graph: Graph) -> None:
        """Nothing."""

    def after(self, pass_: Pass[Any], graph: Graph, record: PassRecord) -> None:
        """Hand out the text, take back the graph. Raises what the function raises."""
        if pass_.name not in self._edits:
            return
        if pass_.stage == "cache" and graph.dialect != "serving":
            self._report.note(
                f"the edit after {pass_.name} is not made: the model is not served, there is no "
                "graph with a KV cache"
            )
            return
        original = print_graph(graph)
        text, error = original, ""
        while True:
            edited = self._edits[pass_.name](text, error)
            if not isinstance(edited, str):
                raise ProgramFormatError(
                    f"the edit after {pass_.name} returned {type(edited).__name__}, not the text"
                )
            if edited == original:
                return
            if error and edited == text:
                # Nothing was mended: asking again would ask forever.
                raise ProgramFormatError(f"the edit after {pass_.name}: {error}")
            start = time.perf_counter()
            try:
                names = namespaces_of(graph)
                parsed = parse_graph(edited, graph.weights, graph.packed, names)
                verify(parsed, after=NAME)
                self._check_form(graph, parsed)
                break
            except (ProgramFormatError, VerifyError) as raised:
                text, error = edited, str(raised)
        self._take(graph, parsed, record.stage, time.perf_counter() - start)

    def _check_form(self, graph: Graph, parsed: Graph) -> None:
        if _head(parsed) != _head(graph):
            raise VerifyError("an edit cannot change the inputs of the graph, its name or dialect")

    def _take(self, graph: Graph, parsed: Graph, stage: str, seconds: float) -> None:
        before, nodes = graph.op_counts(), graph.num_calls()
        graph.gm, graph.symbols = parsed.gm, parsed.symbols
        graph.next_number = max(graph.next_number, parsed.next_number)
        graph.prune_weights()
        delta = graph.op_counts()
        delta.subtract(before)
        changed = Counter({op: count for op, count in delta.items() if count})
        record = PassRecord(NAME, stage, seconds * 1e3, 0.0, (), nodes, graph.num_calls(), changed)
        self._report.passes.append(record)
        graph.records += (record,)
        self._recorder.record(NAME, graph)


def _head(graph: Graph) -> list[str]:
    """The lines of the text that say what the graph is and what it is given."""
    lines = print_graph(graph).splitlines()
    return [line for line in lines if line.startswith(("graph ", "input "))]
