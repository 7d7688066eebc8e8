"""Which backends there are: graphopt's own, and plugins' (entry points `graphopt.backends`).

An entry point names a `BackendKind`. Whoever compiles, loads or shows a program asks here by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from graphopt import plugins
from graphopt.codegen.backend import Backend, BackendKind
from graphopt.errors import BackendError, PluginError, UnsupportedError, did_you_mean

_OURS = ("graphopt.codegen.cpu.backend", "graphopt.codegen.reference")
_FALLBACK = "reference"


def backends() -> dict[str, BackendKind]:
    """Every backend by its name, graphopt's own first.

    Raises PluginError for a plugin that is no BackendKind or whose name another backend has.
    """
    ours: list[BackendKind] = [importlib.import_module(module).KIND for module in _OURS]
    known = {kind.name: kind for kind in ours}
    for described, value in plugins.load("graphopt.backends"):
        if not isinstance(value, BackendKind):
            raise PluginError(
                f"the plugin {described} (graphopt.backends) is a {type(value).__name__}, not a "
                "graphopt.codegen.backend.BackendKind"
            )
        if known.get(value.name, value) is not value:
            raise PluginError(
                f"the plugin {described} (graphopt.backends) is called {value.name!r}, as another "
                "backend is"
            )
        known[value.name] = value
    return known


def find(name: str) -> BackendKind:
    """The backend called `name`. Raises UnsupportedError naming the ones there are."""
    known = backends()
    if name not in known:
        raise UnsupportedError(
            f"backend={name!r} is not supported; supported: {tuple(known)}"
            + (did_you_mean(name, known) if isinstance(name, str) else "")
        )
    return known[name]


def select(name: str, note: Callable[[str], None], threads: int | None = None) -> Backend:
    """The backend called `name`, ready to lower. note: is told of a fallback.

    Raises UnsupportedError for unknown names, BackendError for a backend that cannot run here and
    has no fallback.
    """
    kind = find(name)
    try:
        return kind.make(threads, note)
    except BackendError as error:
        if not kind.falls_back:
            raise
        note(f"{name} backend unavailable, running on the slow reference backend: {error}")
        return find(_FALLBACK).make(None, note)
