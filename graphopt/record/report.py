"""What happened, as data: one record a pass, one reason a rejected candidate, one logger.

Passes never print. The CLI, `explain`, dumps and tests all read the same `Report`. A report goes to
JSON and back, so that a saved program keeps its own.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

LOGGER = logging.getLogger("graphopt")
LIMIT = "limit"
"""Code of the candidates that match and were left alone because of `limits=`."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A candidate that a pass looked at and left alone.

    code: stable identifier (`mask-not-causal`); text: the reason in words; node, layer, source:
    where it is; mend: what would make it match, "" when nothing would.
    """

    code: str
    text: str
    node: str
    layer: str
    source: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Site:
    """One applied rewrite, numbered within its pass: `fuse_attention#7`.

    replaced: ops of the calls that were in the graph before and that this rewrite removed or left
    unused. made: ops of the calls it put in their place, in order. Both are empty for a pass that
    builds a whole new graph. remark: what the rewrite left behind, and why ("" for nothing).
    """

    name: str
    layer: str
    source: str
    replaced: tuple[str, ...] = ()
    made: tuple[str, ...] = ()
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Absorbed:
    """What became of a candidate that an earlier rewrite of the same pass removed.

    site: that rewrite.
    """

    site: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that a pass considered, and what became of it.

    node, op: its name in the graph text that the pass found ("%12"), and its op; layer, source:
    where it is, "" where that is not known.
    """

    node: str
    op: str
    layer: str
    source: str
    result: Site | Rejection | Absorbed


@dataclass(frozen=True, slots=True)
class PassRecord:
    """One pass of one run. `op_delta`: op name -> change of its count; times in milliseconds.

    candidates: everything the pass considered, each node once, in the pass's order.
    limit: how many rewrites it was allowed, None for any number.
    """

    name: str
    stage: str
    milliseconds: float
    verify_milliseconds: float
    candidates: tuple[Candidate, ...]
    nodes_before: int
    nodes_after: int
    op_delta: Counter[str]
    limit: int | None = None

    @property
    def has_changes(self) -> bool:
        """True when the pass applied or removed anything."""
        return bool(self.sites) or self.nodes_before != self.nodes_after

    @property
    def sites(self) -> tuple[Site, ...]:
        """The rewrites that were applied."""
        return tuple(c.result for c in self.candidates if isinstance(c.result, Site))

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        """The candidates left alone, those beyond the limit too."""
        return tuple(c.result for c in self.candidates if isinstance(c.result, Rejection))


@dataclass(frozen=True, slots=True)
class NumericChange:
    """How far a pass moved the outputs: largest absolute, relative (to the largest value of the
    output) and in units in the last place of that value."""

    pass_name: str
    max_absolute: float
    max_relative: float
    max_ulp: float


@dataclass(slots=True)
class Report:
    """The record of one compilation: stages outside the passes in seconds, then the passes.

    disabled: passes that the user turned off. notes: what a user should know; model_notes: those of
    them that are about the model and its files, whatever machine compiles it. limits: the sizes
    that the program takes, each with the line of the model that caused it. assumptions: what
    rewrites took for granted of inputs, in words; see `graphopt.ir.assumptions`.
    """

    passes: list[PassRecord] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    numerics: list[NumericChange] = field(default_factory=list)
    disabled: list[str] = field(default_factory=list)
    model_notes: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)

    def sites(self, pass_name: str) -> int:
        """Number of rewrites a pass applied, over all its runs."""
        return sum(len(record.sites) for record in self.passes if record.name == pass_name)

    def rejections(self, pass_name: str) -> list[Rejection]:
        """Every candidate a pass rejected."""
        return [r for record in self.passes if record.name == pass_name for r in record.rejections]

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Record what the block takes as `seconds[stage]`."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start

    def note(self, text: str) -> None:
        """Remember and log something a user should know (a fallback, a skipped step)."""
        self.notes.append(text)
        LOGGER.warning(text)

    def note_model(self, text: str) -> None:
        """A note that belongs to the model: a saved program keeps it."""
        self.note(text)
        self.model_notes.append(text)

    def to_dict(self) -> dict[str, Any]:
        """What the passes did, in plain values. Seconds and the other notes, which belong to the
        machine that compiled, are left out."""
        return {
            "disabled": list(self.disabled),
            "model_notes": list(self.model_notes),
            "limits": list(self.limits),
            "assumptions": list(self.assumptions),
            "numerics": [asdict(change) for change in self.numerics],
            "passes": [
                {
                    **{name: getattr(record, name) for name in _PLAIN},
                    "op_delta": dict(record.op_delta),
                    "candidates": [_candidate_to_dict(c) for c in record.candidates],
                }
                for record in self.passes
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Back from `to_dict`. Raises KeyError, TypeError, ValueError or AttributeError for
        anything else, values of another type among them."""
        notes = _texts(data.get("model_notes", []))
        return cls(
            passes=[
                _made(
                    PassRecord,
                    **{name: entry[name] for name in _PLAIN},
                    op_delta=Counter(entry["op_delta"]),
                    candidates=tuple(_candidate_from_dict(c) for c in entry["candidates"]),
                )
                for entry in data["passes"]
            ],
            disabled=_texts(data["disabled"]),
            limits=_texts(data.get("limits", [])),
            assumptions=_texts(data.get("assumptions", [])),
            numerics=[_made(NumericChange, **change) for change in data.get("numerics", ())],
            notes=notes,
            model_notes=list(notes),
        )

    def table(self) -> Table:
        """The table the CLI prints: pass, ms, sites, nodes before and after, and below it what is
        assumed."""
        from rich.table import Table

        table = Table(title="passes", caption=assumed(self.assumptions))
        for heading in ("pass", "ms", "sites", "rejected", "nodes before", "nodes after"):
            table.add_column(heading, justify="left" if heading == "pass" else "right")
        for record in self.passes:
            table.add_row(
                record.name,
                f"{record.milliseconds:.0f}",
                str(len(record.sites)),
                str(len(record.rejections)),
                str(record.nodes_before),
                str(record.nodes_after),
            )
        return table


def assumed(assumptions: Sequence[str]) -> Text | None:
    """The assumptions as lines below a table; None where there are none."""
    from rich.text import Text

    # Text, since brackets are not markup.
    return Text("\n".join(f"assumes: {line}" for line in assumptions)) if assumptions else None


def grouped(rejections: Sequence[Rejection]) -> list[tuple[str, int]]:
    """Reason texts with how often each occurs, most frequent first."""
    return Counter(f"{r.code}: {r.text}" for r in rejections).most_common()


_PLAIN = (
    "name",
    "stage",
    "milliseconds",
    "verify_milliseconds",
    "nodes_before",
    "nodes_after",
    "limit",
)
_RESULTS: dict[str, type[Site | Rejection | Absorbed]] = {
    "site": Site,
    "rejection": Rejection,
    "absorbed": Absorbed,
}


def _candidate_to_dict(candidate: Candidate) -> dict[str, Any]:
    kind = type(candidate.result).__name__.lower()
    plain = {name: getattr(candidate, name) for name in ("node", "op", "layer", "source")}
    return {**plain, kind: asdict(candidate.result)}


def _candidate_from_dict(data: Mapping[str, Any]) -> Candidate:
    rest = dict(data)
    (kind,) = _RESULTS.keys() & rest.keys()
    result: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in rest.pop(kind).items()
    }
    return _made(Candidate, **rest, result=_made(_RESULTS[kind], **result))


_T = TypeVar("_T")


def _made(cls: type[_T], **values: Any) -> _T:
    """A record of a file, each field of the type that it is declared to have."""
    for entry in fields(cast(Any, cls)):
        is_legal = _LEGAL.get(str(entry.type))
        if is_legal is not None and entry.name in values and not is_legal(values[entry.name]):
            raise TypeError(f"{entry.name} is {values[entry.name]!r:.60}")
    return cls(**values)


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not _is_texts(tuple(value)):
        raise TypeError(f"{value!r:.60} is no list of texts")
    return list(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, str) for item in value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_LEGAL: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": _is_integer,
    "int | None": lambda value: value is None or _is_integer(value),
    "float": lambda value: isinstance(value, float) or _is_integer(value),
    "tuple[str, ...]": _is_texts,
    "Counter[str]": lambda value: _is_texts(tuple(value)) and all(map(_is_integer, value.values())),
}
"""By the text of a declaration."""
