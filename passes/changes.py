"""Which rewrite removed and made which nodes, seen from outside the pass.

FX tells of every node that is made or erased. A node erased inside a rewrite is that rewrite's; a
node that is erased later because nothing reads it any more belongs to the rewrite that took its
last reader away. Nodes that were dead before belong to none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx

from graphopt.ir.graph import Graph, op_name


class Changes:
    """Nodes by the rewrite that made or removed them; filled while `watched` is open."""

    def __init__(self) -> None:
        self.erased_by: dict[fx.Node, str] = {}
        self._made_by: dict[fx.Node, str] = {}
        self._freed_by: dict[fx.Node, str] = {}
        self._removed: dict[str, list[str]] = defaultdict(list)
        self._histories: dict[str, set[str]] = defaultdict(set)
        self._added: dict[str, list[fx.Node]] = defaultdict(list)
        self._site = ""

    @contextmanager
    def by(self, site: str) -> Iterator[None]:
        """What happens inside is done by `site`."""
        self._site = site
        try:
            yield
        finally:
            self._site = ""

    def replaced(self, site: str) -> tuple[str, ...]:
        """Ops of the calls that `site` removed, operands first; its own helpers are left out."""
        return tuple(reversed(self._removed[site]))

    def made(self, site: str) -> tuple[str, ...]:
        """Ops of the calls that `site` added, in order."""
        kept = (node for node in self._added[site] if self.erased_by.get(node) != site)
        return tuple(op_name(node) for node in kept if node.op == "call_function")

    def tell_histories(self) -> None:
        """The last call that a rewrite made comes from all that the rewrite removed."""
        for site, removed in self._histories.items():
            alive = [node for node in self._added[site] if node not in self.erased_by]
            if alive:
                alive[-1].meta["history"] |= removed

    def created(self, node: fx.Node) -> None:
        """FX made `node`."""
        if self._site:
            self._made_by[node] = self._site
            self._added[self._site].append(node)

    def erased(self, node: fx.Node) -> None:
        """FX is about to erase `node`."""
        site = self._site or self._freed_by.get(node, "")
        if not site:
            return
        self.erased_by[node] = site
        for operand in node.all_input_nodes:
            self._freed_by[operand] = site
        if node.op == "call_function" and self._made_by.get(node) != site:
            self._removed[site].append(op_name(node))
            self._histories[site] |= node.meta.get("history", frozenset())


@contextmanager
def watched(graph: Graph) -> Iterator[Changes]:
    """Watch the FX graph that `graph` has now; a graph put in its place is not followed."""
    changes, module = Changes(), graph.gm
    module._register_create_node_hook(changes.created)
    module._register_erase_node_hook(changes.erased)
    try:
        yield changes
    finally:
        module._unregister_create_node_hook(changes.created)
        module._unregister_erase_node_hook(changes.erased)
