"""The options of `compile`, checked before anything runs: every one exists, none is ignored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.export import ExportedProgram

from graphopt.check.edit import Asked, as_asked
from graphopt.codegen import registry as backends
from graphopt.errors import PassError, UnsupportedError
from graphopt.ir.graph import Graph
from graphopt.passes.manager import Instrument
from graphopt.passes.recipe import is_count
from graphopt.passes.registry import find
from graphopt.program.program import KV_DTYPES

_MOST_THREADS = 1024


def check_choices(backend: str, activations: str, kv_dtype: str, serving: str) -> None:
    """Raise UnsupportedError naming the option, its value and what is supported."""
    backends.find(backend)
    choices: dict[str, tuple[Any, tuple[str, ...]]] = {
        "activations": (activations, ("float", "int8")),
        "kv_dtype": (kv_dtype, tuple(KV_DTYPES)),
        "serving": (serving, ("auto", "required", "off")),
    }
    for option, (value, allowed) in choices.items():
        if value not in allowed:
            raise UnsupportedError(f"{option}={value!r} is not supported; supported: {allowed}")


def check_threads(backend: str, threads: int | None) -> None:
    """Raise UnsupportedError for a count the native pool cannot have, or a backend without one."""
    if threads is None:
        return
    if not is_count(threads) or not 1 <= threads <= _MOST_THREADS:
        raise UnsupportedError(
            f"threads={threads!r} is not supported; supported: an integer from 1 to "
            f"{_MOST_THREADS}, or None for as many as torch uses"
        )
    if not backends.find(backend).has_threads:
        able = [kind.name for kind in backends.backends().values() if kind.has_threads]
        raise UnsupportedError(
            f"threads={threads} is an option of backend={' and '.join(map(repr, able))}; "
            f"backend={backend!r} uses torch's threads: torch.set_num_threads"
        )


def check_source(model: Any, example: Any, dynamic: Any) -> None:
    """Raise UnsupportedError for a graph that cannot be compiled, and for an example or dynamic
    axes beside something that is captured already."""
    if isinstance(model, (Graph, ExportedProgram)) and not (example is None and dynamic is True):
        raise UnsupportedError(
            f"the inputs of a {type(model).__name__} were fixed when it was captured: example and "
            "dynamic have no effect on it; give them to what captures the model"
        )
    if not isinstance(model, Graph):
        return
    if model.dialect != "captured":
        raise UnsupportedError(
            f"{model.name} is a {model.dialect} graph, which is compiled already; compile the "
            "captured graph: graphopt.capture(model)"
        )
    for node in model.nodes:
        name = str(node.target)
        if node.op == "get_attr" and model.weights[name].is_meta and name not in model.packed:
            raise UnsupportedError(
                f"weight {name!r} of the graph has no data: the program that was compiled from "
                "this graph took it over. Compile what graphopt.capture(model) returns, which "
                "keeps its weights"
            )


def check_edits(edit: Mapping[str, Any] | None, running: Sequence[str]) -> dict[str, Asked]:
    """The edits as a dict. Raises PassError for an edit that would not be made."""
    if not isinstance(edit or {}, Mapping):
        raise PassError(f"edit={edit!r} must be a dict: edit={{'fuse_norm': function}}")
    edits: dict[str, Asked] = {}
    for name, function in (edit or {}).items():
        find(name)
        if name not in running:
            raise PassError(f"edit names {name!r}, which is not in this run")
        asked = as_asked(function)
        if asked is None:
            raise PassError(
                f"edit={{{name!r}: {function!r}}}: a function (text) -> text, or "
                "(text, error) -> text to be asked again when its text cannot be read"
            )
        edits[name] = asked
    return edits


def check_instruments(instruments: Any) -> list[Instrument]:
    """The instruments as a list. Raises PassError for what is none."""
    if not isinstance(instruments, Sequence) or isinstance(instruments, str):
        raise PassError(f"instruments={instruments!r} must be a list of instruments")
    for instrument in instruments:
        methods = (getattr(instrument, name, None) for name in ("before", "after"))
        if isinstance(instrument, type) or not all(map(callable, methods)):
            raise PassError(
                f"instruments holds {instrument!r}, which is no instrument: an object with "
                "before(pass_, graph) and after(pass_, graph, record)"
            )
    return list(instruments)
