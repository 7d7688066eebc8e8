"""What happened, as data: one record a pass, one reason a rejected candidate, one logger.

Passes never print. The CLI, `explain`, dumps and tests all read the same `Report`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.table import Table

LOGGER = logging.getLogger("graphopt")


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
    """One applied rewrite, numbered within its pass: `fuse_attention#7`."""

    name: str
    layer: str
    source: str


@dataclass(frozen=True, slots=True)
class PassRecord:
    """One pass of one run. `op_delta`: op name -> change of its count; times in milliseconds."""

    name: str
    milliseconds: float
    verify_milliseconds: float
    sites: tuple[Site, ...]
    rejections: tuple[Rejection, ...]
    nodes_before: int
    nodes_after: int
    op_delta: Counter[str]


@dataclass(slots=True)
class Report:
    """The record of one compilation: stages outside the passes in seconds, then the passes."""

    passes: list[PassRecord] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def sites(self, pass_name: str) -> int:
        """Number of rewrites a pass applied, over all its runs."""
        return sum(len(record.sites) for record in self.passes if record.name == pass_name)

    def rejections(self, pass_name: str) -> list[Rejection]:
        """Every candidate a pass rejected."""
        return [r for record in self.passes if record.name == pass_name for r in record.rejections]

    def note(self, text: str) -> None:
        """Remember and log something a user should know (a fallback, a skipped step)."""
        self.notes.append(text)
        LOGGER.warning(text)

    def table(self) -> Table:
        """The table the CLI prints: pass, ms, sites, nodes before and after."""
        table = Table(title="passes")
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


def grouped(rejections: Sequence[Rejection]) -> list[tuple[str, int]]:
    """Reason texts with how often each occurs, most frequent first."""
    return Counter(f"{r.code}: {r.text}" for r in rejections).most_common()
