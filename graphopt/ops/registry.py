"""The op registry: one file per op under `graphopt/ops`, each calling `define` once.

`define` creates the torch op (schema, reference for every device, fake) and records what the
compiler wants to know about it. The library object is process-wide because torch's is.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import graphopt.ops

# torch leaves these three methods untyped.
_LIBRARY: Any = torch.library.Library("graphopt", "DEF")  # type: ignore[no-untyped-call]
_REGISTRY: dict[str, OpSpec] = {}
_ASSERTS = (
    torch.ops.aten._assert_async.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten._assert_scalar.default,
)


@dataclass(frozen=True, slots=True)
class Cost:
    """Work of one call: floating-point operations, and bytes read plus written at least once."""

    flops: float
    bytes: float


@dataclass(frozen=True, slots=True)
class OpSpec:
    """Everything known about one `graphopt::` op.

    reference: the definition of its meaning, plain torch, any device.
    fake: shape and dtype of its result.
    cost: called like the op, on fake or real tensors.
    mutates: names of the arguments it writes (KV-cache storage only).
    """

    name: str
    overload: torch._ops.OpOverload
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    cost: Callable[..., Cost]
    mutates: tuple[str, ...]


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cost: Callable[..., Cost],
) -> OpSpec:
    """Register `graphopt::<schema>`. The schema's `(a!)` marks name the mutated arguments."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphopt::{name}", fake, lib=_LIBRARY)
    overload = getattr(torch.ops.graphopt, name).default
    mutates = tuple(
        argument.name
        for argument in overload._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    spec = OpSpec(name, overload, reference, fake, cost, mutates)
    _REGISTRY[name] = spec
    return spec


def load_all() -> dict[str, OpSpec]:
    """Import every op file and return the registry, name -> spec."""
    for module in pkgutil.iter_modules(graphopt.ops.__path__):
        if module.name != "registry":
            importlib.import_module(f"graphopt.ops.{module.name}")
    return dict(_REGISTRY)


def spec_of(target: object) -> OpSpec | None:
    """The spec of an op overload, None for ops that are not ours."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "graphopt":
        return _REGISTRY.get(target._schema.name.partition("::")[2])
    return None


def is_impure(target: object) -> bool:
    """True when calling it changes an argument."""
    if isinstance(target, torch._ops.OpOverload):
        return any(
            argument.alias_info is not None and argument.alias_info.is_write
            for argument in target._schema.arguments
        )
    return False


def checks_values(target: object) -> bool:
    """True for asserts about values: they may fail, so they run although nobody reads them."""
    return isinstance(target, torch._ops.OpOverload) and target in _ASSERTS


def nbytes(*tensors: torch.Tensor | None) -> float:
    """Bytes of all tensors together; symbolic sizes give symbolic bytes."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
