"""Which ops a graph text can name: torch's, those that graphopt, its plugins and transformers
define, those of namespaces that the caller trusts, and arithmetic on sizes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from graphopt.ir.opset import OpSpec
from graphopt.ir.size_arithmetic import SIZE_FUNCTIONS

_LIBRARIES = {"transformers": "transformers.integrations.moe"}
"""Namespaces of ops that Hugging Face models are captured with -> the module that defines them."""


def op_named(
    name: str, defined: Mapping[str, OpSpec], namespaces: Collection[str]
) -> Callable[..., Any]:
    """The op that `aten.linear`, `sym.mul` or `graphopt.rope` names.

    defined: ops by name, as `load_all` gives them. namespaces: of further torch ops.
    Raises LookupError with what is wrong.
    """
    namespace, _, rest = name.partition(".")
    if namespace == "sym" and rest in SIZE_FUNCTIONS:
        return SIZE_FUNCTIONS[rest]
    if name in defined:
        return defined[name].overload
    torchs = {"aten", "prims", *_LIBRARIES, *namespaces}
    known = {op.partition(".")[0] for op in defined} | {"sym", *torchs}
    if namespace not in known:
        raise LookupError(
            f"unknown op {name!r}: no installed plugin defines ops of the namespace "
            f"{namespace!r}; there are {', '.join(sorted(known))}"
        )
    if namespace in _LIBRARIES:
        importlib.import_module(_LIBRARIES[namespace])
    parts = rest.split(".")
    if namespace in torchs and 1 <= len(parts) <= 2:
        packet = getattr(getattr(torch.ops, namespace), parts[0], None)
        op = getattr(packet, parts[1] if len(parts) == 2 else "default", None)
        if isinstance(op, torch._ops.OpOverload):
            return op
    raise LookupError(f"unknown op {name!r}")
