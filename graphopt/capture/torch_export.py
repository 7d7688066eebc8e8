"""torch.export with sizes that stay open: which road was taken is told by `Decisions`.

Every named axis is left to torch to find out (`Dim.AUTO`), so that torch never refuses a size by
itself: what the model asked about sizes becomes limits (`bounds.py`), and an axis that the model
fixed is refused here, with the line that fixed it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from graphopt.capture.bounds import cause_of_fixed
from graphopt.capture.open_arguments import named_arguments
from graphopt.capture.refusals import refusal
from graphopt.capture.size_decisions import Decisions, is_model_file, recorded_decisions
from graphopt.errors import CaptureError

Axes = Mapping[str, Mapping[int, str]]
_COMPARISONS = ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__")


def export_module(
    module: nn.Module,
    call: Mapping[str, Any],
    axes: Axes,
    strict: bool,
    name: str,
    positional: Sequence[str] = (),
) -> tuple[ExportedProgram, Decisions]:
    """The exported program, and what the model asked about sizes on the way.

    call: arguments by name; those named in `positional` are given to forward by position, in that
    order. axes: argument -> axis -> name of the symbolic size; others are fixed.
    Raises CaptureError naming what is in the way, where, and what to do.
    """
    _check_axes(call, axes)
    try:
        return _exported(module, call, axes, strict, name, positional)
    except TypeError as error:
        if "must be bool, not SymBool" not in str(error):
            raise refusal(error, name, call) from error
    except CaptureError:
        raise
    except Exception as error:
        raise refusal(error, name, call) from error
    # A comparison of sizes was given to an op (is_causal=n > 1): decide it where it is made.
    try:
        with decided_comparisons():
            return _exported(module, call, axes, strict, name, positional)
    except CaptureError:
        raise
    except Exception as error:
        raise refusal(error, name, call) from error


def _exported(
    module: nn.Module,
    call: Mapping[str, Any],
    axes: Axes,
    strict: bool,
    name: str,
    positional: Sequence[str],
) -> tuple[ExportedProgram, Decisions]:
    shapes = {
        argument: dict.fromkeys(axes[argument], Dim.AUTO) if argument in axes else None
        for argument in call
    }
    same = _same_sizes(axes)
    with named_arguments(module, call, positional, same), recorded_decisions() as decisions:
        program = torch.export.export(module, (), dict(call), dynamic_shapes=shapes, strict=strict)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in axes:
            for axis, size in axes[node.name].items():
                _check_open(node.meta["val"].shape[axis], node.name, axis, size, name, decisions)
    return program, decisions


def _check_axes(call: Mapping[str, Any], axes: Axes) -> None:
    first: dict[str, tuple[str, int, int]] = {}
    for argument, named in axes.items():
        for axis, size in named.items():
            found = int(call[argument].shape[axis])
            if found < 2:
                raise CaptureError(
                    f"axis {axis} ({size}) of example input {argument!r} has size {found}; a "
                    "dynamic axis needs at least 2 in the example"
                )
            other, its_axis, expected = first.setdefault(size, (argument, axis, found))
            if found != expected:
                raise CaptureError(
                    f"size {size!r} is {expected} in axis {its_axis} of example input {other!r} "
                    f"and {found} in axis {axis} of {argument!r}; give them different names in "
                    "dynamic=, or an example where they agree"
                )


def _same_sizes(axes: Axes) -> list[list[tuple[str, int]]]:
    places: dict[str, list[tuple[str, int]]] = {}
    for argument, named in axes.items():
        for axis, size in named.items():
            places.setdefault(size, []).append((argument, axis))
    return [group for group in places.values() if len(group) > 1]


def _check_open(
    value: Any, argument: str, axis: int, size: str, name: str, decisions: Decisions
) -> None:
    if isinstance(value, torch.SymInt) and value.node.maybe_as_int() is None:
        expression = value.node.expr
        if expression.is_Symbol:
            return
        found = f"always {expression} where the sizes of other axes are its symbols"
        cause = cause_of_fixed(decisions, str(next(iter(expression.free_symbols))))
    else:
        found = f"fixed at {int(value)}"
        symbol = _symbol_of(decisions, argument, axis)
        cause = None if symbol is None else cause_of_fixed(decisions, symbol)
    place = f" at {cause.source}" if cause is not None and cause.source else ""
    raise CaptureError(
        f"axis {axis} ({size!r}) of {argument!r} is {found} by {name}{place}; leave this axis out "
        "of dynamic= (dynamic=False fixes all sizes), or change that line to work for any size"
    )


def _symbol_of(decisions: Decisions, argument: str, axis: int) -> str | None:
    """The symbol that torch made for an axis, whatever became of it later."""
    if decisions.shape_env is None:
        return None
    for source, symbol in decisions.shape_env.source_to_var.items():
        if argument in source and source.endswith(f".size()[{axis}]"):
            return str(symbol)
    return None


@contextmanager
def decided_comparisons() -> Iterator[None]:
    """Within, code of the model that compares a symbolic size gets a bool at once."""

    def decided(original: Any) -> Any:
        def compare(self: torch.SymInt, other: Any) -> Any:
            answer = original(self, other)
            is_models = is_model_file(sys._getframe(1).f_code.co_filename)
            return bool(answer) if is_models and isinstance(answer, torch.SymBool) else answer

        return compare

    previous = {name: getattr(torch.SymInt, name) for name in _COMPARISONS}
    try:
        for name, original in previous.items():
            setattr(torch.SymInt, name, decided(original))
        yield
    finally:
        for name, original in previous.items():
            setattr(torch.SymInt, name, original)
