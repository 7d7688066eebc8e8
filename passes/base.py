"""What a pass is.

    match(graph)            -> candidate nodes, in order
    check(graph, node)      -> frozen bindings, or a Reject that says why not
    rewrite(builder, bound) -> nodes changed through the builder

Metadata is declared on the class and read by the manager: nothing about a pass is implied by the
position of its file or of its call. A candidate that `check` turns down is recorded with its
reason; every applied rewrite has a site number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

from torch import fx

from graphopt.ir.builder import GraphBuilder
from graphopt.ir.graph import Graph
from graphopt.report import Rejection, Site

Stage = Literal["cleanup", "fuse", "architecture", "cache", "quantize", "distribute", "lower"]
STAGES: tuple[Stage, ...] = (
    "cleanup",
    "fuse",
    "architecture",
    "quantize",
    "cache",
    "distribute",
    "lower",
)


@dataclass(frozen=True, slots=True)
class Tier:
    """How a pass may change results.

    exact: bitwise equal. reassociating: equal up to rounding, `tolerance` relative.
    approximate: changes the model; `metric` names what must be measured.
    """

    kind: Literal["exact", "reassociating", "approximate"]
    tolerance: float = 0.0
    metric: str = ""


EXACT = Tier("exact")


@dataclass(frozen=True, slots=True)
class Reject:
    """Why a candidate is left alone.

    node: what is in the way. mend: what would make it match, "" when nothing would.
    """

    code: str
    text: str
    node: fx.Node
    mend: str = ""


Bindings = TypeVar("Bindings")


class Pass(ABC, Generic[Bindings]):
    """Base of all passes; see the module docstring. Instances hold no state between steps."""

    name: ClassVar[str]
    stage: ClassVar[Stage]
    after: ClassVar[tuple[str, ...]] = ()
    tier: ClassVar[Tier] = EXACT
    requires: ClassVar[tuple[str, ...]] = ()
    preserves: ClassVar[tuple[str, ...]] = ()
    required: ClassVar[bool] = False
    """A required pass is never skipped by limits, disabling or bisection."""

    @abstractmethod
    def match(self, graph: Graph) -> Iterable[fx.Node]:
        """Candidates: nodes where the rewrite might apply."""

    @abstractmethod
    def check(self, graph: Graph, node: fx.Node) -> Bindings | Reject:
        """Everything the rewrite needs, or the reason it must not happen. Changes nothing."""

    @abstractmethod
    def rewrite(self, builder: GraphBuilder, bound: Bindings) -> None:
        """Apply it. The manager removes what became dead."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run of a pass did."""

    sites: tuple[Site, ...]
    rejections: tuple[Rejection, ...]


def run_pass(pass_: Pass[Any], graph: Graph, limit: int | None = None) -> Outcome:
    """Match, check and rewrite until the candidates are used up.

    limit: apply at most this many rewrites; candidates beyond it are left alone.
    """
    builder = GraphBuilder(graph)
    sites: list[Site] = []
    rejections: list[Rejection] = []
    for node in list(pass_.match(graph)):
        if limit is not None and len(sites) >= limit:
            break
        if node.graph is not graph.fx_graph or node._erased:
            continue
        bound = pass_.check(graph, node)
        layer, source = node.meta.get("layer", ""), node.meta.get("source", "")
        if isinstance(bound, Reject):
            blocker = bound.node
            rejections.append(
                Rejection(
                    bound.code,
                    bound.text,
                    blocker.name,
                    blocker.meta.get("layer", "") or layer,
                    blocker.meta.get("source", "") or source,
                    bound.mend,
                )
            )
            continue
        site = f"{pass_.name}#{len(sites)}"
        with builder.at(node, site):
            pass_.rewrite(builder, bound)
        sites.append(Site(site, layer, source))
    return Outcome(tuple(sites), tuple(rejections))
