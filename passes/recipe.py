"""Which passes run, from what the user named: every name exists, every choice can be kept.

`Recipe` is the answer as a value; `plan_passes` makes it, or raises before any model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.errors import PassError, UnsupportedError
from graphopt.passes.manager import PassManager
from graphopt.passes.registry import default_passes, find

SERVING_PASS = "insert_kv_cache"
_INT8_PASS = "quantize_activations"


@dataclass(frozen=True, slots=True)
class Recipe:
    """The passes of a compilation, by exact names.

    forward: of the graph without a cache; serving: of its copy that gets one, empty for none.
    disabled: left out by name; limits: pass name -> highest number of rewrites.
    """

    forward: tuple[str, ...]
    serving: tuple[str, ...]
    disabled: tuple[str, ...]
    limits: Mapping[str, int]

    @property
    def running(self) -> tuple[str, ...]:
        """The passes that are not left out."""
        return self.forward + self.serving


def plan_passes(
    passes: Sequence[str] | None,
    enable: Iterable[str],
    disable: Iterable[str],
    limits: Mapping[str, int] | None,
    activations: str,
    serving: str,
) -> Recipe:
    """What runs, from what `compile` was told.

    Raises PassError for names that do not exist, limits that could not be kept, orders in conflict
    and a required pass among the disabled, UnsupportedError for a choice of passes that another
    option contradicts.
    """
    off = names_in("disable", disable)
    if passes is None:
        chosen = default_passes() + ([_INT8_PASS] if activations == "int8" else [])
    else:
        chosen = names_in("passes", passes)
    chosen += [name for name in names_in("enable", enable) if name not in chosen]
    if activations == "int8" and (_INT8_PASS not in chosen or _INT8_PASS in off):
        raise UnsupportedError(
            f"activations='int8' is done by the pass {_INT8_PASS!r}, which this run leaves out"
        )
    if serving == "required" and SERVING_PASS not in chosen:
        raise UnsupportedError(
            f"serving='required' needs the pass {SERVING_PASS!r}, which passes= leaves out"
        )
    chosen = [name for name in chosen if name not in off]
    forward = [name for name in chosen if find(name).stage != "cache"]
    cached = [name for name in chosen if find(name).stage == "cache" and serving != "off"]
    checked = check_limits(limits, [*forward, *cached])
    # Raises what would otherwise come up after the model was loaded and captured.
    PassManager(forward, disable=off)
    return Recipe(tuple(forward), tuple(cached), tuple(off), checked)


def names_in(option: str, value: Iterable[str]) -> list[str]:
    """The pass names given as `option`. Raises PassError for anything else."""
    if isinstance(value, str):
        raise PassError(f"{option}={value!r} must be a list of pass names: {option}=[{value!r}]")
    if not isinstance(value, Iterable):
        raise PassError(f"{option}={value!r} must be a list of pass names")
    names = list(value)
    for name in names:
        if not isinstance(name, str):
            raise PassError(f"{option} holds {name!r}, which is no pass name")
        find(name)
    return names


def check_limits(limits: Mapping[str, int] | None, running: Sequence[str]) -> dict[str, int]:
    """The limits as a dict. Raises PassError for a limit that could not be kept."""
    if not isinstance(limits or {}, Mapping):
        raise PassError(f"limits={limits!r} must be a dict: limits={{'fuse_norm': 2}}")
    for name, limit in (limits or {}).items():
        if find(name).required:
            raise PassError(f"pass {name!r} must run and cannot be limited")
        if name not in running:
            raise PassError(f"limits names {name!r}, which is not in this run")
        if not is_count(limit) or limit < 0:
            raise PassError(f"limits={{{name!r}: {limit!r}}}: a limit is an integer >= 0")
    return dict(limits or {})


def is_count(value: Any) -> bool:
    """True for an int that is no bool."""
    return isinstance(value, int) and not isinstance(value, bool)
