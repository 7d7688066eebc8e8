"""Runs passes in order. It knows no pass by name; everything around a pass is an instrument.

Instruments see `before(pass, graph)` and `after(pass, graph, record)` and may raise; those of
`compile` are `TraceRecorder`, `NumericsCheck` and `EditAfter`. `run_pass` leaves no dead nodes;
after it the graph is verified.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from graphopt.errors import PassError
from graphopt.ir.graph import Graph
from graphopt.ir.verify import verify
from graphopt.passes.base import Pass, run_pass
from graphopt.passes.registry import find, ordered
from graphopt.record.report import PassRecord, Report


class Instrument(Protocol):
    """Watches a run. `before` is called with the graph as the pass will find it."""

    def before(self, pass_: Pass[Any], graph: Graph) -> None:
        """Called before each pass."""

    def after(self, pass_: Pass[Any], graph: Graph, record: PassRecord) -> None:
        """Called after each pass, on the verified graph."""


class PassManager:
    """One pipeline.

    names: the passes of this run, in any order; `disable`: exact names left out (a required pass
    cannot be); `limits`: pass name -> highest number of rewrites it may apply.
    Raises PassError for unknown names and order conflicts, before anything runs.
    """

    def __init__(
        self,
        names: Iterable[str],
        *,
        disable: Iterable[str] = (),
        limits: Mapping[str, int] | None = None,
        instruments: Sequence[Instrument] = (),
    ) -> None:
        disabled = set(disable)
        for name in [*disabled, *(limits or {})]:
            find(name)
        for name in disabled:
            if find(name).required:
                raise PassError(f"pass {name!r} must run and cannot be disabled")
        self.passes = [cls() for cls in ordered(n for n in names if n not in disabled)]
        self.disabled = sorted(disabled)
        self.limits = dict(limits or {})
        self.instruments = tuple(instruments)

    def run(self, graph: Graph, report: Report) -> Graph:
        """Apply every pass to `graph` in place.

        One record a pass is appended to `report` and to the graph's own `records`.
        """
        report.disabled += [name for name in self.disabled if name not in report.disabled]
        for pass_ in self.passes:
            for instrument in self.instruments:
                instrument.before(pass_, graph)
            ops_before, nodes_before = graph.op_counts(), graph.num_calls()
            checked = set(graph.nodes)
            start = time.perf_counter()
            limit = None if pass_.required else self.limits.get(pass_.name)
            candidates = run_pass(pass_, graph, limit)
            rewritten = time.perf_counter()
            verify(graph, after=pass_.name, trusted=checked)
            done = time.perf_counter()
            delta = graph.op_counts()
            delta.subtract(ops_before)
            record = PassRecord(
                pass_.name,
                pass_.stage,
                (rewritten - start) * 1e3,
                (done - rewritten) * 1e3,
                candidates,
                nodes_before,
                graph.num_calls(),
                type(delta)({op: change for op, change in delta.items() if change}),
                limit,
            )
            report.passes.append(record)
            graph.records += (record,)
            for instrument in self.instruments:
                instrument.after(pass_, graph, record)
        return graph
