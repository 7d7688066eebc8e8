"""What a pass is.

    match(graph)            -> candidate nodes, in order
    check(graph, node)      -> frozen bindings, or a Reject that says why not
    rewrite(builder, bound) -> nodes changed through the builder

Metadata is declared on the class and read by the manager: nothing about a pass is implied by the
position of its file or of its call. Every candidate is recorded once: as a site with its number, as
rejected with the reason of `check`, or as absorbed by an earlier site.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Literal, TypeVar

from torch import fx

from graphopt.ir.builder import GraphBuilder
from graphopt.ir.clean import remove_dead
from graphopt.ir.graph import Graph, dtype_of, op_name, value_name
from graphopt.passes.changes import watched
from graphopt.record.report import LIMIT, Absorbed, Candidate, Rejection, Site

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


def not_floats(op: str, *values: fx.Node | None) -> Reject | None:
    """The reason for leaving values alone that are complex numbers or integers: fused ops compute
    with real ones."""
    for value in values:
        if value is not None and not dtype_of(value).is_floating_point:
            text = f"{op} computes with real floats, and this is {dtype_of(value)}"
            return Reject("not-floats", text, value)
    return None


Bindings = TypeVar("Bindings")


class Pass(ABC, Generic[Bindings]):
    """Base of all passes; see the module docstring. Instances hold no state between steps."""

    name: ClassVar[str]
    stage: ClassVar[Stage]
    after: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()
    """Passes of the same or of a later stage that run after this one."""
    tier: ClassVar[Tier] = EXACT
    requires: ClassVar[tuple[str, ...]] = ()
    preserves: ClassVar[tuple[str, ...]] = ()
    required: ClassVar[bool] = False
    """A required pass is never skipped by limits, disabling or bisection."""
    default: ClassVar[bool] = True
    """A pass that is off by default runs only where it is asked for by name."""

    @abstractmethod
    def match(self, graph: Graph) -> Iterable[fx.Node]:
        """Candidates: nodes where the rewrite might apply."""

    @abstractmethod
    def check(self, graph: Graph, node: fx.Node) -> Bindings | Reject:
        """Everything the rewrite needs, or the reason it must not happen. Changes nothing."""

    @abstractmethod
    def rewrite(self, builder: GraphBuilder, bound: Bindings) -> None:
        """Apply it. `run_pass` removes what became dead."""

    def remark(self, bound: Bindings) -> str:
        """What an applied rewrite leaves behind, and why, for `explain`; "" for nothing."""
        del bound
        return ""


def run_pass(pass_: Pass[Any], graph: Graph, limit: int | None = None) -> tuple[Candidate, ...]:
    """Match, check and rewrite until the candidates are used up; then remove what became dead.

    limit: apply at most this many rewrites. Candidates beyond it are still checked, and those that
        match are recorded as rejected with the code `limit`; 0 changes nothing that was alive.
    Returns every candidate once, in the order of `match`.
    """
    builder = GraphBuilder(graph)
    found: dict[fx.Node, Candidate] = {}
    site_nodes: dict[str, fx.Node] = {}
    with watched(graph) as changes:
        for node in dict.fromkeys(pass_.match(graph)):
            layer, source = node.meta.get("layer", ""), node.meta.get("source", "")
            result: Site | Rejection | Absorbed
            if node.graph is not graph.fx_graph or node in changes.erased_by:
                result = Absorbed(changes.erased_by.get(node) or list(site_nodes)[-1])
            elif isinstance(bound := pass_.check(graph, node), Reject):
                result = _rejection(bound, layer, source)
            elif limit is not None and len(site_nodes) >= limit:
                text = f"the limit of {limit} rewrites was reached"
                mend = f"raise or drop limits={{{pass_.name!r}: {limit}}}"
                result = Rejection(LIMIT, text, value_name(node), layer, source, mend)
            else:
                name, remark = f"{pass_.name}#{len(site_nodes)}", pass_.remark(bound)
                result = Site(name, layer, source, remark=remark)
                site_nodes[result.name] = node
            found[node] = Candidate(value_name(node), op_name(node), layer, source, result)
            if isinstance(result, Site):
                with builder.at(node, result.name), changes.by(result.name):
                    pass_.rewrite(builder, bound)
        remove_dead(graph)
    changes.tell_histories()
    for name, node in site_nodes.items():
        site = found[node].result
        assert isinstance(site, Site)
        changed = replace(site, replaced=changes.replaced(name), made=changes.made(name))
        found[node] = replace(found[node], result=changed)
    return tuple(found.values())


def _rejection(reject: Reject, layer: str, source: str) -> Rejection:
    meta = reject.node.meta
    return Rejection(
        reject.code,
        reject.text,
        value_name(reject.node),
        meta.get("layer", "") or layer,
        meta.get("source", "") or source,
        reject.mend,
    )
