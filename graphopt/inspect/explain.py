"""`graphopt.explain`: what passes did with every node they considered.

It reads the record of the one real run and runs nothing again, so it costs nothing and cannot
disagree with what happened. It knows no pass by name: what it shows is what `run_pass` recorded of
any pass.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from graphopt.errors import NoRecordError, PassError, UnsupportedError
from graphopt.inspect.rows import (
    Explanation,
    Member,
    Outcome,
    PassRun,
    Row,
)
from graphopt.ir.graph import Graph
from graphopt.passes.base import run_pass
from graphopt.passes.registry import all_passes, ordered
from graphopt.program.program import Program
from graphopt.record.layers import layer_range, layer_shape
from graphopt.record.report import LIMIT, Absorbed, Candidate, PassRecord, Rejection, Report, Site


def explain(subject: Program | Graph | Report, *passes: str, dry_run: bool = False) -> Explanation:
    """A row for each kind of candidate of `passes`, by default of every pass that ran.

    subject: a program, compiled or loaded; a report; or a graph that passes were run on, which
        holds the records of those passes itself. Each run of a pass is shown for itself.
    dry_run: the one case in which something is run: for a graph, `match` and `check` of the passes
        are called on the graph as it is now, nothing is rewritten, and earlier records are not
        read. Passes do not see each other's results then: a fusion that needs the cleanup passes
        first may reject what it would fuse after them.

    Raises PassError for names of no known pass, NoRecordError (a PassError) for a pass that did
    not run and for a subject without any record, UnsupportedError for other subjects and for a
    dry run of something other than a graph.
    """
    if dry_run:
        if not isinstance(subject, Graph):
            raise UnsupportedError(
                f"dry_run=True takes a Graph, not a {type(subject).__name__}; "
                "what its passes did is recorded, leave dry_run out"
            )
        return Explanation(tuple(_dry_run(subject, name) for name in _known(passes)))
    records, disabled, holder = _records(subject)
    if not records and not disabled:
        raise NoRecordError(f"{holder} holds no record of passes; {_remedy(subject)}")
    for name in passes:
        if name not in {record.name for record in records} | set(disabled):
            raise _no_such(name, records, disabled, holder)
    chosen = list(dict.fromkeys(passes))
    seen: Counter[str] = Counter()
    runs = []
    for record in records:
        seen[record.name] += 1
        if not chosen or record.name in chosen:
            rows = _rows(record.candidates, dry=False)
            runs.append(PassRun(record.name, record.stage, seen[record.name], rows, record.limit))
    for name in disabled:
        if not seen[name] and (not chosen or name in chosen):
            runs.append(PassRun(name, _stage(name), 0, ()))
    if chosen:
        runs.sort(key=lambda run: chosen.index(run.name))
    return Explanation(tuple(runs), _assumptions(subject))


def _records(
    subject: Program | Graph | Report,
) -> tuple[Sequence[PassRecord], Sequence[str], str]:
    """(records, names of disabled passes, what holds them in words)."""
    if isinstance(subject, Graph):
        return subject.records, (), f"graph {subject.name!r}"
    if isinstance(subject, Program):
        return subject.report.passes, subject.report.disabled, f"program {subject.options.name!r}"
    if isinstance(subject, Report):
        return subject.passes, subject.disabled, "this report"
    raise UnsupportedError(
        f"explain takes a Program, a Graph or a Report, not a {type(subject).__name__}"
    )


def _assumptions(subject: Program | Graph | Report) -> tuple[str, ...]:
    if isinstance(subject, Graph):
        return tuple(map(str, subject.assumptions))
    return tuple((subject.report if isinstance(subject, Program) else subject).assumptions)


def _remedy(subject: Program | Graph | Report) -> str:
    if isinstance(subject, Graph):
        return (
            "run passes on it (graphopt.compile, PassManager.run), explain the program it belongs "
            "to, or check it as it is with dry_run=True"
        )
    return "no pass was run, or it was saved before programs kept their report: compile it again"


def _no_such(
    name: str, records: Sequence[PassRecord], disabled: Sequence[str], holder: str
) -> PassError:
    ran = list(dict.fromkeys(record.name for record in records))
    known = all_passes()
    text = f"passes that ran: {', '.join(ran) or 'none'}"
    if disabled:
        text += f"; disabled: {', '.join(disabled)}"
    if name in known:
        return NoRecordError(f"pass {name!r} did not run on {holder}; {text}")
    idle = sorted(known.keys() - set(ran) - set(disabled))
    text += f"; passes that exist and did not run: {', '.join(idle)}" if idle else ""
    return PassError(f"unknown pass {name!r}{_near(name, [*ran, *known])}; {text}")


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(set(known)), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _known(passes: Sequence[str]) -> list[str]:
    known = all_passes()
    for name in passes:
        if name not in known:
            near = _near(name, known)
            raise PassError(f"unknown pass {name!r}{near}; passes: {', '.join(sorted(known))}")
    return list(dict.fromkeys(passes)) or [cls.name for cls in ordered(known)]


def _stage(name: str) -> str:
    known = all_passes()
    return known[name].stage if name in known else ""


def _dry_run(graph: Graph, name: str) -> PassRun:
    pass_ = all_passes()[name]()
    # On a copy: with no rewrite allowed only calls that were dead already would go, even so.
    rows = _rows(run_pass(pass_, graph.copy(), limit=0), dry=True)
    return PassRun(name, pass_.stage, 1, rows, dry=True)


def _rows(candidates: Iterable[Candidate], *, dry: bool) -> tuple[Row, ...]:
    """Group, in the order in which the first of each group was considered."""
    groups: dict[Any, list[Candidate]] = {}
    alike: Counter[Any] = Counter()
    for candidate in candidates:
        like = _like(candidate)
        alike[like] += 1
        outcome, code = _outcome(candidate.result, dry)
        groups.setdefault((like, outcome, code, _source(candidate)), []).append(candidate)
    return tuple(
        _row(outcome, code, members, alike[like])
        for (like, outcome, code, _), members in groups.items()
    )


def _like(candidate: Candidate) -> tuple[str, str, str]:
    return candidate.op, layer_shape(_layer(candidate)), candidate.source


def _layer(candidate: Candidate) -> str:
    result = candidate.result
    blocked = result.layer if isinstance(result, Rejection) else ""
    return candidate.layer or blocked


def _source(candidate: Candidate) -> str:
    result = candidate.result
    blocked = result.source if isinstance(result, Rejection) else ""
    return blocked or candidate.source


def _outcome(result: Site | Rejection | Absorbed, dry: bool) -> tuple[Outcome, str]:
    if isinstance(result, Site):
        return "applied", ""
    if isinstance(result, Absorbed):
        return "absorbed", ""
    if result.code == LIMIT:
        return ("matches", "") if dry else ("limited", LIMIT)
    return "rejected", result.code


def _row(outcome: Outcome, code: str, candidates: Sequence[Candidate], total: int) -> Row:
    first = candidates[0]
    members = tuple(_member(candidate, outcome) for candidate in candidates)
    changes = Counter(
        (c.result.replaced, c.result.made) for c in candidates if isinstance(c.result, Site)
    )
    usual = changes.most_common(1)[0][0] if changes else ((), ())
    shown = isinstance(first.result, Rejection) and outcome != "matches"
    return Row(
        outcome,
        code,
        first.op,
        layer_range(member.layer for member in members),
        _source(first),
        members[0].text,
        first.result.mend if isinstance(first.result, Rejection) and shown else "",
        total,
        members,
        *usual,
    )


def _member(candidate: Candidate, outcome: Outcome) -> Member:
    result, layer = candidate.result, _layer(candidate)
    if isinstance(result, Site):
        return Member(candidate.node, layer, result.remark, site=result.name)
    if isinstance(result, Absorbed):
        text = "an earlier rewrite of this pass removed it"
        return Member(candidate.node, layer, text, site=result.site)
    if outcome == "matches":
        return Member(candidate.node, layer)
    return Member(candidate.node, layer, result.text, result.node)
