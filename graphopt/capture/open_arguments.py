"""Arguments that fall into forward's **kwargs, given names for the time of an export.

torch.export (2.13, non-strict) cannot give a dynamic size to what lies inside **kwargs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def named_arguments(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Within, every name of `names` is a parameter of `module.forward`.

    Those that the signature lacks become keyword-only; forward itself still gets them by keyword.
    """
    original = module.forward
    signature = inspect.signature(original)
    parameters = list(signature.parameters.values())
    missing = [name for name in names if name not in signature.parameters]
    if not missing:
        yield
        return

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    kept = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in missing]
    forward.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
    previous = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if previous is not None:
            module.forward = previous
