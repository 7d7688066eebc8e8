"""Which passes exist and in what order they run: by declaration, resolved with networkx."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any, TypeVar

import networkx as nx

from graphopt.errors import PassError, did_you_mean
from graphopt.passes.base import STAGES, Pass

_REGISTRY: dict[str, type[Pass[Any]]] = {}
P = TypeVar("P", bound=type[Pass[Any]])


def register(cls: P) -> P:
    """Class decorator: make a pass known by its name."""
    if cls.name in _REGISTRY and _REGISTRY[cls.name] is not cls:
        raise PassError(f"two passes are called {cls.name!r}")
    _REGISTRY[cls.name] = cls
    return cls


def all_passes() -> dict[str, type[Pass[Any]]]:
    """Every registered pass; imports all pass files first."""
    for stage in STAGES:
        try:
            package = importlib.import_module(f"graphopt.passes.{stage}")
        except ModuleNotFoundError:
            continue
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"graphopt.passes.{stage}.{module.name}")
    return dict(_REGISTRY)


def default_passes() -> list[str]:
    """Names of the passes that run unless something else is asked for: those that are on by default
    and do not change the model."""
    known = all_passes().items()
    return [name for name, cls in known if cls.default and cls.tier.kind != "approximate"]


def find(name: str) -> type[Pass[Any]]:
    """The pass called `name`, or PassError naming the ones there are."""
    known = all_passes()
    if name not in known:
        raise PassError(
            f"unknown pass {name!r}; known passes: {', '.join(sorted(known))}"
            + did_you_mean(name, known)
        )
    return known[name]


def ordered(names: Iterable[str]) -> list[type[Pass[Any]]]:
    """Classes of `names` by stage, then by `after`, then by name.

    Raises PassError for unknown names, cycles, unmet `requires`, and an `after` that points to
    a later stage.
    """
    classes = {name: find(name) for name in names}
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(classes)
    for name, cls in classes.items():
        for needed in cls.requires:
            if needed not in classes:
                raise PassError(f"pass {name!r} requires {needed!r}, which is not in this run")
        for earlier in (*cls.after, *cls.requires):
            if earlier in classes:
                if STAGES.index(classes[earlier].stage) > STAGES.index(cls.stage):
                    raise PassError(
                        f"pass {name!r} ({cls.stage}) is declared after {earlier!r}, "
                        f"which belongs to the later stage {classes[earlier].stage!r}"
                    )
                graph.add_edge(earlier, name)
    if not nx.is_directed_acyclic_graph(graph):
        cycle = [edge[0] for edge in nx.find_cycle(graph)]
        raise PassError("passes wait for each other: " + " -> ".join([*cycle, cycle[0]]))
    order = nx.lexicographical_topological_sort(
        graph, key=lambda name: (STAGES.index(classes[name].stage), name)
    )
    stage_sorted = sorted(order, key=lambda name: STAGES.index(classes[name].stage))
    return [classes[name] for name in stage_sorted]
