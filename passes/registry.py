"""Which passes exist and in what order they run: by declaration, resolved with networkx.

Passes come from this package, from plugins (entry points `graphopt.passes`, see
`graphopt/plugins.py`), and from whatever the user's own code registers.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Collection, Iterable, Iterator
from types import ModuleType
from typing import Any, TypeVar

import networkx as nx

from graphopt import plugins
from graphopt.errors import PassError, PluginError, did_you_mean
from graphopt.passes.base import STAGES, Pass, Tier

_NAME, _TAKEN = re.compile(r"[a-zA-Z]\w*", re.ASCII), ("capture", "edit")
_REGISTRY: dict[str, type[Pass[Any]]] = {}
P = TypeVar("P", bound=type[Pass[Any]])


def register(cls: P) -> P:
    """Class decorator: make a pass known by its name.

    Raises PassError for a name that another pass has or that no file could have, and for a stage,
    a tier or an order that is none.
    """
    name, stage = getattr(cls, "name", None), getattr(cls, "stage", None)
    where = f"{cls.__module__}.{cls.__qualname__} of {origin(cls)}"
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _TAKEN:
        raise PassError(
            f"{where} has the name {name!r}; a pass is named by letters, digits and _, and not "
            f"{' or '.join(_TAKEN)}"
        )
    if stage not in STAGES:
        raise PassError(
            f"pass {cls.name!r} of {origin(cls)} has stage {stage!r}; stages: {', '.join(STAGES)}"
            + did_you_mean(str(stage), STAGES)
        )
    tier = getattr(cls, "tier", None)
    if not isinstance(tier, Tier):
        raise PassError(f"{where} has tier {tier!r}, which is no graphopt.passes.base.Tier")
    for order in ("after", "before", "requires"):
        names = getattr(cls, order, ())
        if isinstance(names, str) or not all(isinstance(n, str) for n in names):
            raise PassError(f"{where} has {order}={names!r}; write a tuple of names of passes")
    other = _REGISTRY.get(cls.name, cls)
    if other is not cls:
        raise PassError(
            f"two passes are called {cls.name!r}: {other.__module__}.{other.__qualname__} of "
            f"{origin(other)} and {cls.__module__}.{cls.__qualname__} of {origin(cls)}"
        )
    _REGISTRY[cls.name] = cls
    return cls


register_pass = register
"""`register` as `graphopt.register_pass`."""


def origin(cls: type[Pass[Any]]) -> str:
    """Where a pass comes from: "graphopt", a distribution with plugins, or a module."""
    return plugins.origin(cls.__module__)


def all_passes() -> dict[str, type[Pass[Any]]]:
    """Every registered pass; imports all pass files and plugins first.

    Raises PluginError for a plugin that cannot be loaded or is no pass.
    """
    for stage in STAGES:
        try:
            package = importlib.import_module(f"graphopt.passes.{stage}")
        except ModuleNotFoundError:
            continue
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"graphopt.passes.{stage}.{module.name}")
    for described, value in plugins.load("graphopt.passes"):
        if isinstance(value, type) and issubclass(value, Pass):
            register(value)
        elif not isinstance(value, ModuleType):
            raise PluginError(
                f"the plugin {described} (graphopt.passes) is a {type(value).__name__}, neither a "
                "module that registers passes nor a Pass class"
            )
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
    """Classes of `names` by stage, then by `after`, `before` and `requires`, then by name.

    Raises PassError for unknown names, in declarations as well, for cycles, unmet `requires`, and
    a declared order that the stages contradict.
    """
    classes = {name: find(name) for name in names}
    known = all_passes()
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(classes)
    for name, cls in classes.items():
        for needed in cls.requires:
            if needed not in classes:
                _check_exists(cls, "requires", needed, known)
                raise PassError(f"{_named(cls)} requires {needed!r}, which is not in this run")
        for relation, other, edge in _declared(cls):
            _check_exists(cls, relation, other, known)
            if other in classes:
                _check_stages(cls, relation, classes[other], edge[0] == name)
                graph.add_edge(*edge)
    if not nx.is_directed_acyclic_graph(graph):
        cycle = [edge[0] for edge in nx.find_cycle(graph)]
        passes = [_named(classes[name], "") for name in [*cycle, cycle[0]]]
        raise PassError("passes wait for each other: " + " -> ".join(passes))
    order = nx.lexicographical_topological_sort(
        graph, key=lambda name: (STAGES.index(classes[name].stage), name)
    )
    stage_sorted = sorted(order, key=lambda name: STAGES.index(classes[name].stage))
    return [classes[name] for name in stage_sorted]


def _declared(cls: type[Pass[Any]]) -> Iterator[tuple[str, str, tuple[str, str]]]:
    """(relation, the other pass, (earlier, later)) of everything a pass declares."""
    for other in (*cls.after, *cls.requires):
        yield "after", other, (other, cls.name)
    for other in cls.before:
        yield "before", other, (cls.name, other)


def _named(cls: type[Pass[Any]], kind: str = "pass ") -> str:
    """`pass 'fuse_norm'`, with the origin of one that is not graphopt's own."""
    place = origin(cls)
    return f"{kind}{cls.name!r}" + ("" if place == "graphopt" else f" of {place}")


def _check_exists(cls: type[Pass[Any]], relation: str, other: str, known: Collection[str]) -> None:
    if other not in known:
        raise PassError(
            f"{_named(cls)} declares {relation}={other!r}, which is no pass"
            + did_you_mean(other, known)
        )


def _check_stages(
    cls: type[Pass[Any]], relation: str, other: type[Pass[Any]], is_first: bool
) -> None:
    earlier, later = (cls, other) if is_first else (other, cls)
    if STAGES.index(earlier.stage) > STAGES.index(later.stage):
        raise PassError(
            f"{_named(cls)} ({cls.stage}) is declared {relation} {other.name!r}, which belongs to "
            f"the {'earlier' if is_first else 'later'} stage {other.stage!r}"
        )
