"""What `explain` returns: the candidates of each pass in rows, as a table, text or JSON.

Candidates are one row when their layer paths differ only in numbers and their pass, run, op, source
lines, outcome and code are the same: `model.layers.{0-29}.self_attn`, 30/30. Every candidate is a
member of exactly one row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from graphopt.record.report import assumed

Outcome = Literal["applied", "rejected", "limited", "absorbed", "matches"]


@dataclass(frozen=True, slots=True)
class Member:
    """One candidate.

    node: its name; layer: its module path; text: the reason, "" for an applied rewrite;
    blocker: the node that is in the way; site: the rewrite that it became or that absorbed it.
    """

    node: str
    layer: str
    text: str = ""
    blocker: str = ""
    site: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """Candidates that differ only in the numbers of their layers.

    outcome: "applied"; "rejected" (text says why, mend what would make it match); "limited" (it
        matches, `limits=` kept the pass from it); "absorbed" (an earlier rewrite of the same pass
        removed it); "matches" (it would be applied: dry runs only).
    code: of the rejection, "" for other outcomes than "rejected" and "limited".
    op: of the candidates. layer: their paths in one. source: "file.py:12" of the model, where the
        rejection is, else where the candidate is.
    total: candidates of this op, line and layer path, whatever became of them.
    replaced, made: ops of the calls that a rewrite removed and added, those of most members.
    """

    outcome: Outcome
    code: str
    op: str
    layer: str
    source: str
    text: str
    mend: str
    total: int
    members: tuple[Member, ...]
    replaced: tuple[str, ...] = ()
    made: tuple[str, ...] = ()

    @property
    def count(self) -> str:
        """`24/24`: members of the row, of all candidates like them."""
        return f"{len(self.members)}/{self.total}"

    @property
    def change(self) -> str:
        """`3 aten.mul, aten.rsqrt -> graphopt.rms_norm`, "" when nothing was changed."""
        if not self.replaced and not self.made:
            return ""
        return f"{_counted(self.replaced)} -> {_counted(self.made) or 'nothing'}".strip()

    @property
    def reason(self) -> str:
        """`code: text`, and on a second line what would make it match; "" for an applied one."""
        why = f"{self.code}: {self.text}" if self.code else self.text
        others = len({member.text for member in self.members}) - 1
        why += f" (and {others} other wordings)" if others > 0 else ""
        return f"{why}\nto match: {self.mend}" if self.mend else why


@dataclass(frozen=True, slots=True)
class PassRun:
    """One run of one pass.

    run: 1 for the first run of this pass, 0 when it was disabled and did not run.
    limit: how many rewrites were allowed, None for any number.
    dry: nothing was rewritten; the rows say what would happen on the graph as it is.
    """

    name: str
    stage: str
    run: int
    rows: tuple[Row, ...]
    limit: int | None = None
    dry: bool = False

    def count(self, outcome: Outcome) -> int:
        """Number of candidates with this outcome."""
        return sum(len(row.members) for row in self.rows if row.outcome == outcome)

    @property
    def is_complete(self) -> bool:
        """True when no candidate was left alone."""
        return all(row.outcome in ("applied", "absorbed", "matches") for row in self.rows)

    @property
    def verb(self) -> str:
        """How an applied rewrite is called."""
        return "fused" if self.stage == "fuse" else "applied"

    def word(self, outcome: Outcome) -> str:
        """How an outcome is called in tables and text."""
        return self.verb if outcome == "applied" else outcome

    @property
    def summary(self) -> str:
        """`30 of 32 fused, 2 rejected`. Absorbed candidates are not among the 32."""
        if not self.run:
            return "disabled, did not run"
        absorbed = self.count("absorbed")
        total = sum(len(row.members) for row in self.rows) - absorbed
        if not total:
            return "no candidates"
        done = self.count("matches" if self.dry else "applied")
        text = f"{done} of {total} {'would be ' if self.dry else ''}{self.verb}"
        for outcome in ("rejected", "limited"):
            found = self.count(outcome)
            text += f", {found} {outcome}" if found else ""
        return text + (f"; {absorbed} more absorbed" if absorbed else "")


@dataclass(frozen=True, slots=True)
class Explanation:
    """What passes did with every candidate, or would do (`dry` of each run).

    assumptions: what their rewrites took for granted of inputs, in words.
    """

    runs: tuple[PassRun, ...]
    assumptions: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of all runs."""
        return tuple(row for run in self.runs for row in run.rows)

    @property
    def summary(self) -> str:
        """`30 of 30 fused`; a line for each run when there are several."""
        if len(self.runs) == 1:
            return self.runs[0].summary
        return "\n".join(f"{self.title(run)}: {run.summary}" for run in self.runs)

    def title(self, run: PassRun) -> str:
        """Name of the pass, with the number of the run where there are several."""
        several = sum(other.name == run.name for other in self.runs) > 1
        return f"{run.name} (run {run.run})" if several else run.name

    def run_table(self, run: PassRun) -> Table:
        """The rows of one of the runs, with its summary as the title."""
        return self._table([run])

    def table(self) -> Table:
        """All rows as one table, for `rich.print`."""
        return self._table(self.runs)

    def _table(self, runs: Iterable[PassRun]) -> Table:
        chosen = list(runs)
        alone = len(chosen) == 1
        title = f"{self.title(chosen[0])}: {chosen[0].summary}" if alone else "candidates"
        caption = assumed(self.assumptions)
        table = Table(
            title=Text(title), title_justify="left", caption=caption, caption_justify="left"
        )
        for heading in ([] if alone else ["pass"]) + [
            "outcome",
            "count",
            "candidate",
            "change, or why not",
        ]:
            right = heading == "count"
            table.add_column(heading, justify="right" if right else "left", overflow="fold")
        for run in chosen:
            for row in run.rows:
                cells = [] if alone else [self.title(run)]
                where = "\n".join(filter(None, (row.op, row.layer, row.source)))
                why = row.reason or row.change
                cells += [run.word(row.outcome), row.count, where, why]
                # Text, since the brackets of a reason are not markup.
                table.add_row(*(Text(cell) for cell in cells))
            if not alone and not run.rows:
                table.add_row(Text(self.title(run)), "", "", "", Text(run.summary))
            table.add_section()
        return table

    def __str__(self) -> str:
        lines = []
        for run in self.runs:
            lines.append(f"{self.title(run)}: {run.summary}")
            for row in run.rows:
                where = "  ".join(filter(None, (row.op, row.layer, row.source)))
                lines.append(f"  {row.count} {run.word(row.outcome)}  {where}")
                lines += [f"      {line}" for line in (row.reason or row.change).splitlines()]
        lines += [f"assumes: {line}" for line in self.assumptions]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` reads them back, but for the counts and summaries."""
        runs = []
        for run in self.runs:
            rows = [{**asdict(row), "count": row.count} for row in run.rows]
            runs.append({**asdict(run), "rows": rows, "summary": run.summary})
        return {"runs": runs, "assumptions": list(self.assumptions)}

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Explanation:
        """Back from `to_dict`. Raises KeyError or TypeError for anything else."""
        runs = tuple(_run(entry) for entry in data["runs"])
        return cls(runs, tuple(data.get("assumptions", ())))


def _run(entry: Mapping[str, Any]) -> PassRun:
    fields = {name: value for name, value in entry.items() if name != "summary"}
    return PassRun(**{**fields, "rows": tuple(_row(row) for row in entry["rows"])})


def _row(entry: Mapping[str, Any]) -> Row:
    fields = {name: value for name, value in entry.items() if name != "count"}
    for name in ("replaced", "made"):
        fields[name] = tuple(entry[name])
    return Row(**{**fields, "members": tuple(Member(**member) for member in entry["members"])})


def _counted(ops: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for op in ops:
        counts[op] = counts.get(op, 0) + 1
    return ", ".join(op if count == 1 else f"{count} {op}" for op, count in counts.items())
