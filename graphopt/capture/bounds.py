"""torch.export with sizes that the model bounds (learned positions, tables cut to the sequence)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from graphopt.capture.open_arguments import named_arguments
from graphopt.errors import CaptureError

Axes = Mapping[str, Mapping[int, str]]
_SUGGESTED = re.compile(r"(?P<name>\w+) = Dim\('\w+', max=(?P<max>\d+)\)")
_ATTEMPTS = 4


def export_module(
    module: nn.Module, call: Mapping[str, Any], axes: Axes, strict: bool, name: str
) -> ExportedProgram:
    """torch.export; when it finds that a size has an upper bound, once more with that bound.

    call: keyword arguments. axes: argument -> axis -> name of the symbolic size; others are fixed.
    Raises CaptureError with torch's own reason.
    """
    bounds: dict[str, int] = {}
    for attempt in range(_ATTEMPTS):
        shapes = _dynamic_shapes(call, axes, bounds)
        try:
            with named_arguments(module, call):
                return torch.export.export(
                    module, (), dict(call), dynamic_shapes=shapes, strict=strict
                )
        except CaptureError:
            raise
        except Exception as error:
            tighter = _tightened(str(error), bounds) if attempt + 1 < _ATTEMPTS else None
            if tighter is None:
                raise CaptureError(_explained(name, str(error))) from error
            bounds = tighter
    raise AssertionError("unreachable")


def limits_of(program: ExportedProgram, symbols: Mapping[str, str]) -> dict[str, int]:
    """Upper bound of each symbolic size that has one, by its name in `symbols`."""
    return {
        symbols[str(symbol)]: int(bounds.upper)
        for symbol, bounds in program.range_constraints.items()
        # An unbounded size has int_oo, which is no sympy.Integer, or the largest int64.
        if str(symbol) in symbols
        and isinstance(bounds.upper, sympy.Integer)
        and bounds.upper < 2**62
    }


def _dynamic_shapes(
    call: Mapping[str, Any], axes: Axes, bounds: Mapping[str, int]
) -> dict[str, dict[int, Dim] | None]:
    names = {name for per_input in axes.values() for name in per_input.values()}
    dims = {name: Dim(name, max=bounds.get(name)) for name in names}
    return {
        argument: {axis: dims[name] for axis, name in axes[argument].items()}
        if argument in axes
        else None
        for argument in call
    }


def _tightened(message: str, bounds: Mapping[str, int]) -> dict[str, int] | None:
    """Bounds for another attempt: those torch.export suggests, when it suggests nothing else; or
    one less, when the model behaves differently at the bound itself. None: there is no way."""
    found = {match["name"]: int(match["max"]) for match in _SUGGESTED.finditer(message)}
    suggested = set(re.findall(r"^\s*(\w+) = ", message.partition("Suggested fixes:")[2], re.M))
    if found and suggested == set(found):
        tighter = {**bounds, **found}
        return tighter if tighter != bounds else None
    violated = re.search(r"Constraints violated \(([^)]*)\)", message)
    if suggested or violated is None:
        return None
    names = [name.strip() for name in violated[1].split(",")]
    # A cut of a table is a view of the whole table at its full length, and export asks for "!=".
    if not all(name in bounds for name in names):
        return None
    return {**bounds, **{name: bounds[name] - 1 for name in names}}


def _explained(name: str, reason: str) -> str:
    text = f"torch.export could not capture {name}: {reason}"
    if "Constraints violated" in reason:
        text += (
            "\nA size that the model fixes must be left out of dynamic=, for example "
            'dynamic={"input_ids": {0: "batch"}}; dynamic=False fixes all sizes.'
        )
    return text
