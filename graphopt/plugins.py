"""Plugins: passes, ops and backends of other installed distributions, found by their entry points.

    [project.entry-points."graphopt.passes"]      a module that registers passes, or a Pass class
    acme = "graphopt_acme.fuse_relu_squared"
    [project.entry-points."graphopt.ops"]         a module that defines ops
    acme = "graphopt_acme.relu_squared"
    [project.entry-points."graphopt.backends"]    a graphopt.codegen.backend.BackendKind
    acme = "graphopt_acme.backend:KIND"

Each group is loaded once in a process. The registries of passes, ops and backends ask for theirs.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from graphopt.errors import PluginError

Group = Literal["graphopt.passes", "graphopt.ops", "graphopt.backends"]
GROUPS: tuple[Group, ...] = ("graphopt.passes", "graphopt.ops", "graphopt.backends")


@cache
def load(group: Group) -> tuple[tuple[str, Any], ...]:
    """(description of the entry point, what it names) of every plugin of a group.

    Raises PluginError naming the plugin and the cause when one cannot be imported.
    """
    return tuple((_described(entry), _value(entry)) for entry in _entries(group))


def origin(module: str) -> str:
    """Where a module comes from: "graphopt", the distribution whose plugin it belongs to, or the
    module's own name."""
    top = module.partition(".")[0]
    if top == "graphopt":
        return top
    for group in GROUPS:
        for entry in _entries(group):
            if entry.module.partition(".")[0] == top and entry.dist is not None:
                return entry.dist.name
    return module


@cache
def _entries(group: Group) -> tuple[EntryPoint, ...]:
    return tuple(sorted(entry_points(group=group), key=lambda entry: (entry.value, entry.name)))


def _described(entry: EntryPoint) -> str:
    dist = "an unknown distribution" if entry.dist is None else entry.dist.name
    return f"{entry.name} = {entry.value!r} of {dist}"


def _value(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    # A module may end the process where it is meant to be run, not imported.
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"the plugin {_described(entry)} ({entry.group}) cannot be loaded: "
            f"{type(error).__name__}: {error}; mend it or uninstall it"
        ) from error
