"""What an explorer page holds, as plain values for JSON.

    entries   every distinct line of all steps, with its cost: [kind, id, type, op, args,
              references, layer, source, history, flops, bytes, unit, kernel]; types, ops, layers,
              sources, units and kernels are indices into lists of texts
    steps     the graph as each pass left it: its lines as indices into entries, and its rows: the
              lines of the step before and of this one side by side, flat, -1 for nothing
    passes    the record of each pass; `step` is the step it made, null when it changed nothing,
              `basis` the step that it found
    explain   the rows of `graphopt.explain` for each pass, members with the line they stand at:
              [node, layer, text, blocker, site, entry, step], entry -1 where it is not known

Values keep their numbers through passes, so most lines are entries of many steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from graphopt import __version__
from graphopt.cost.machines import MACHINES
from graphopt.inspect.explain import explain
from graphopt.inspect.explorer.facts import Fact, facts
from graphopt.inspect.explorer.lines import GraphLine, read_lines
from graphopt.inspect.explorer.subject import Subject
from graphopt.record.diff import align
from graphopt.record.report import Candidate, Rejection, Site

FORMAT = 1
_TEXTS = ("types", "ops", "layers", "sources", "units", "kernels")


@dataclass(slots=True)
class _Tables:
    """Entries and texts, each once."""

    entries: dict[tuple[GraphLine, Fact | None], int] = field(default_factory=dict)
    texts: dict[str, dict[str, int]] = field(
        default_factory=lambda: {name: {"": 0} for name in _TEXTS}
    )

    def entry(self, line: GraphLine, fact: Fact | None) -> int:
        return self.entries.setdefault((line, fact), len(self.entries))

    def text(self, table: str, value: str) -> int:
        known = self.texts[table]
        return known.setdefault(value, len(known))

    def rows(self) -> list[list[Any]]:
        return [self._row(line, fact) for line, fact in self.entries]

    def _row(self, line: GraphLine, fact: Fact | None) -> list[Any]:
        cost = None if fact is None else fact.cost
        return [
            line.kind,
            line.id,
            self.text("types", line.type),
            self.text("ops", line.op),
            line.args,
            list(line.references),
            self.text("layers", line.layer),
            self.text("sources", line.source),
            list(line.history),
            None if cost is None else cost.flops,
            None if cost is None else cost.bytes,
            self.text("units", "" if cost is None else cost.unit),
            self.text("kernels", "" if fact is None else fact.kernel),
        ]


def page_data(subject: Subject, batch: int = 1, sequence: int = 512) -> dict[str, Any]:
    """Everything the page shows. batch, sequence: sizes that costs are computed for."""
    tables = _Tables()
    lines: list[list[GraphLine]] = []
    steps: list[dict[str, Any]] = []
    for number, step in enumerate(subject.trace.steps):
        lines.append(read_lines(step.text))
        indices = _entries(lines[-1], facts(step.text, batch, sequence, subject.backend), tables)
        rows: list[int] = []
        if number:
            before = subject.trace.steps[number - 1].text
            rows = _paired(before, step.text, steps[-1]["lines"], indices)
        steps.append({"number": step.number, "name": step.name, "lines": indices, "rows": rows})
    passes = _passes(subject)
    return {
        "format": FORMAT,
        "graphopt": __version__,
        "name": subject.name,
        "batch": batch,
        "sequence": sequence,
        "machines": [{**asdict(machine), "matrix": dict(machine.matrix)} for machine in MACHINES],
        "steps": steps,
        "passes": passes,
        "disabled": list(subject.report.disabled),
        "notes": list(subject.report.notes),
        "explain": _explained(subject, passes, lines, steps),
        "entries": tables.rows(),
        **{name: list(known) for name, known in tables.texts.items()},
    }


def _entries(lines: Sequence[GraphLine], known: Sequence[Fact], tables: _Tables) -> list[int]:
    rest = iter(known)
    return [tables.entry(line, next(rest, None) if line.kind == "call" else None) for line in lines]


def _paired(before: str, after: str, left: Sequence[int], right: Sequence[int]) -> list[int]:
    """`align` gives the lines of each side in their order."""
    lefts, rights = iter(left), iter(right)
    flat: list[int] = []
    for old, new in align(before, after):
        # Empty lines have no entry.
        if not (old or new):
            continue
        flat += [-1 if not old else next(lefts), -1 if not new else next(rights)]
    return flat


def _passes(subject: Subject) -> list[dict[str, Any]]:
    made = {step.number: index for index, step in enumerate(subject.trace.steps)}
    records, basis = [], 0
    for number, record in enumerate(subject.report.passes, start=1):
        step = made.get(number)
        records.append(
            {
                "name": record.name,
                "stage": record.stage,
                "ms": record.milliseconds,
                "verify_ms": record.verify_milliseconds,
                "before": record.nodes_before,
                "after": record.nodes_after,
                "sites": len(record.sites),
                "rejected": len(record.rejections),
                "candidates": len(record.candidates),
                "delta": dict(record.op_delta),
                "limit": record.limit,
                "step": step,
                "basis": basis,
            }
        )
        basis = basis if step is None else step
    return records


def _explained(
    subject: Subject,
    passes: Sequence[dict[str, Any]],
    lines: Sequence[Sequence[GraphLine]],
    steps: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """The rows of `explain`, a list a pass, in the order of the report."""
    runs = [run for run in explain(subject.report).runs if run.run]
    found = []
    for run, record, made in zip(runs, subject.report.passes, passes, strict=True):
        places = _places(record.candidates, made, lines, steps)
        rows = [
            {
                "outcome": row.outcome,
                "word": run.word(row.outcome),
                "op": row.op,
                "layer": row.layer,
                "source": row.source,
                "reason": row.reason,
                "change": row.change,
                "count": row.count,
                "members": [
                    [m.node, m.layer, m.text, m.blocker, m.site, *places[m.node]]
                    for m in row.members
                ],
            }
            for row in run.rows
        ]
        found.append({"summary": run.summary, "rows": rows})
    return found


def _places(
    candidates: Sequence[Candidate],
    made: dict[str, Any],
    lines: Sequence[Sequence[GraphLine]],
    steps: Sequence[dict[str, Any]],
) -> dict[str, tuple[int, int]]:
    """Candidate's node -> (entry, step) of the line it stands at.

    An applied rewrite stands at the first value that it made; what made nothing, or was rejected,
    at its own value in the graph that the pass found.
    """
    before, after = made["basis"], made["step"]
    by_site: dict[str, int] = {}
    if after is not None:
        known = {part for line in lines[before] for part in line.history}
        for line, entry in zip(lines[after], steps[after]["lines"], strict=True):
            for part in line.history:
                if "#" in part and part not in known:
                    by_site.setdefault(part, entry)
    entry_of: dict[str, int] = {}
    for line, entry in zip(lines[before], steps[before]["lines"], strict=True):
        entry_of[line.id] = entry
    places = {}
    for candidate in candidates:
        own = entry_of.get(candidate.node, -1)
        result = candidate.result
        if isinstance(result, Site) and result.name in by_site and after is not None:
            places[candidate.node] = by_site[result.name], after
        elif isinstance(result, (Site, Rejection)):
            places[candidate.node] = own, before
        else:
            places[candidate.node] = (
                by_site.get(result.site, own),
                (after if after is not None and result.site in by_site else before),
            )
    return places
