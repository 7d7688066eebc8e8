"""The example as arguments of forward, by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.errors import CaptureError
from graphopt.ir.plain_tensor import why_not_plain

Example = Tensor | Sequence[Any] | Mapping[str, Any]


def in_order(module: nn.Module, call: Mapping[str, Any]) -> dict[str, Any]:
    """The order of forward's signature, then what falls into its **kwargs."""
    named = {name: call[name] for name in parameters_of(module) if name in call}
    return {**named, **call}


def parameters_of(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Of forward. Raises CaptureError where Python cannot tell them."""
    try:
        return inspect.signature(module.forward).parameters
    except (TypeError, ValueError) as error:
        raise CaptureError(
            f"forward of {type(module).__name__} has no signature to read ({error}); make it a "
            "Python method with named arguments"
        ) from error


def bind(module: nn.Module, example: Example | None) -> tuple[dict[str, Any], list[str]]:
    """The arguments by name, and which of them forward takes by position alone.

    What falls into *args is called args_0, args_1, ... Raises CaptureError for arguments that
    forward does not have, and for tensors that are not plain.
    """
    call, positional = _named(module, example)
    for name, value in call.items():
        for leaf in pytree.tree_leaves(value):
            reason = why_not_plain(leaf) if isinstance(leaf, Tensor) else None
            if reason is not None:
                raise CaptureError(f"the example's {name!r} {reason}")
    return call, positional


def _named(module: nn.Module, example: Any) -> tuple[dict[str, Any], list[str]]:
    parameters = parameters_of(module)
    by_position = inspect.Parameter.POSITIONAL_ONLY
    names = [n for n, p in parameters.items() if p.kind in (by_position, p.POSITIONAL_OR_KEYWORD)]
    positional = [n for n in names if parameters[n].kind is by_position]
    if example is None:
        if not names or names[0] != "input_ids":
            raise CaptureError(
                f"no example given, and the first argument of {type(module).__name__}.forward is "
                f"{names[0] if names else 'missing'!r}, not 'input_ids'"
            )
        return {"input_ids": torch.ones((2, 16), dtype=torch.int64)}, positional
    if isinstance(example, Tensor):
        example = (example,)
    if not isinstance(example, (Mapping, Sequence)) or isinstance(example, (str, bytes)):
        raise CaptureError(
            f"example is a {type(example).__name__}; give what forward takes: a tensor, a list of "
            "positional arguments, or a dict of keyword arguments"
        )
    if isinstance(example, Mapping):
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        unknown = [
            name
            for name in example
            if not isinstance(name, str) or (name not in parameters and not takes_any)
        ]
        if unknown:
            raise CaptureError(f"forward has no argument {unknown[0]!r}; it has {names}")
        return dict(example), [n for n in positional if n in example]
    if len(example) > len(names):
        rest = next((n for n, p in parameters.items() if p.kind is p.VAR_POSITIONAL), None)
        if rest is None:
            raise CaptureError(f"{len(example)} example arguments for forward({', '.join(names)})")
        names += [f"{rest}_{index}" for index in range(len(example) - len(names))]
        positional = names
    call = dict(zip(names, example, strict=False))
    return call, [n for n in positional if n in call]
