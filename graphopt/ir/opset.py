"""The op registry: one file per op, each calling `define` once.

`define` creates the torch op (schema, reference for every device, fake) and records what the
compiler wants to know about it. graphopt's own ops are the files of `graphopt/ops`; plugins bring
ops in namespaces of their own (entry points `graphopt.ops`, see `graphopt/plugins.py`). The library
objects are process-wide because torch's are.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import torch

from graphopt import plugins
from graphopt.errors import PluginError, UnsupportedError

OURS = "graphopt"
RowKind = Literal["pointwise"]
"""How an op treats token rows. pointwise: element by element, with broadcasting."""

_LIBRARIES: dict[str, Any] = {}
_REGISTRY: dict[str, OpSpec] = {}
_TORCHS = ("aten", "prims", "prim", "sym")
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
    """Everything known about one op of ours or of a plugin.

    name: as `op_name` spells it, "graphopt.rope". reference: the definition of its meaning, plain
    torch, any device. fake: shape and dtype of its result. cost: called like the op, on fake or
    real tensors. mutates: names of the arguments it writes (KV-cache storage only). rows: how it
    treats token rows; None: unknown, or a matter of its arguments. step_inputs: argument -> the
    step input that a serving graph hands it unchanged: kernels follow these numbers into memory.
    """

    name: str
    overload: torch._ops.OpOverload
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    cost: Callable[..., Cost]
    mutates: tuple[str, ...]
    rows: RowKind | None = None
    step_inputs: Mapping[str, str] = field(default_factory=dict)


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cost: Callable[..., Cost],
    rows: RowKind | None = None,
    step_inputs: Mapping[str, str] | None = None,
) -> OpSpec:
    """Register an op: `rope(Tensor x, ...) -> Tensor` in the namespace graphopt, with
    `acme::squared(Tensor x) -> Tensor` in acme. The schema's `(a!)` marks name the mutated
    arguments.

    rows: "pointwise" when every element of the result depends on the operands' elements in its
        place only: models that call the op can then be served with a KV cache.
    step_inputs: as in `OpSpec`.
    Raises UnsupportedError for a namespace that is torch's or no name, an op that is defined
    twice, and unknown `rows`.
    """
    signature = schema.partition("(")[0]
    namespace, _, name = signature.rpartition("::")
    namespace = namespace or OURS
    if not (namespace.isidentifier() and name.isidentifier()) or namespace in _TORCHS:
        raise UnsupportedError(
            f"op {signature!r} cannot be defined: write name(...) -> ..., or "
            f"namespace::name(...) -> ... with a namespace other than {', '.join(_TORCHS)}"
        )
    if rows not in (None, "pointwise"):
        raise UnsupportedError(f"rows={rows!r} is not supported; supported: 'pointwise', None")
    full = f"{namespace}.{name}"
    if full in _REGISTRY:
        first = plugins.origin(_REGISTRY[full].reference.__module__)
        second = plugins.origin(reference.__module__)
        raise UnsupportedError(f"op {full!r} is defined twice: by {first} and by {second}")
    library = _library(namespace)
    library.define(schema.removeprefix(f"{namespace}::"))
    library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    overload = getattr(getattr(torch.ops, namespace), name).default
    mutates = tuple(
        argument.name
        for argument in overload._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    spec = OpSpec(full, overload, reference, fake, cost, mutates, rows, dict(step_inputs or {}))
    _REGISTRY[full] = spec
    return spec


def _library(namespace: str) -> Any:
    """The library that ops of a namespace are added to, made on first use."""
    if namespace not in _LIBRARIES:
        # A plugin may have ops of the same namespace that torch.library made.
        kind = "DEF" if namespace == OURS else "FRAGMENT"
        # torch leaves the methods of Library untyped.
        _LIBRARIES[namespace] = torch.library.Library(namespace, kind)  # type: ignore[no-untyped-call]
    return _LIBRARIES[namespace]


def load_all() -> dict[str, OpSpec]:
    """Import every op file and plugin and return the registry, `namespace.name` -> spec.

    Raises PluginError for a plugin that cannot be loaded or names no module.
    """
    # By name: ops stand above the IR, which knows their facts only as they register.
    package = importlib.import_module("graphopt.ops")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    for described, value in plugins.load("graphopt.ops"):
        if not isinstance(value, ModuleType | OpSpec):
            raise PluginError(
                f"the plugin {described} (graphopt.ops) is a {type(value).__name__}, neither a "
                "module that defines ops nor what `define` returned"
            )
    return dict(_REGISTRY)


def spec_of(target: object) -> OpSpec | None:
    """The spec of an op overload, None for ops that `define` did not make."""
    if isinstance(target, torch._ops.OpOverload):
        spec = _REGISTRY.get(target._schema.name.replace("::", "."))
        return spec if spec is not None and spec.overload is target else None
    return None


def is_impure(target: object) -> bool:
    """True when calling it changes an argument."""
    if isinstance(target, torch._ops.OpOverload):
        return any(
            argument.alias_info is not None and argument.alias_info.is_write
            for argument in target._schema.arguments
        )
    return False


def is_pure(target: object) -> bool:
    """True when equal operands give equal results, and a call changes nothing: arithmetic on sizes,
    torch's ops but the random ones, and ops that `define` made. A model's own op may do anything.
    """
    if not isinstance(target, torch._ops.OpOverload):
        return True
    is_known = target.namespace in ("aten", "prims") or spec_of(target) is not None
    is_random = torch.Tag.nondeterministic_seeded in target.tags
    return is_known and not is_random and not is_impure(target)


def checks_values(target: object) -> bool:
    """True for asserts about values: they may fail, so they run although nobody reads them."""
    return isinstance(target, torch._ops.OpOverload) and target in _ASSERTS


def nbytes(*tensors: torch.Tensor | None) -> float:
    """Bytes of all tensors together; symbolic sizes give symbolic bytes."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
