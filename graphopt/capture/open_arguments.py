"""Arguments as torch.export wants them: every one a keyword parameter of forward.

torch.export (2.13, non-strict) cannot give a dynamic size to what lies inside *args or **kwargs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def named_arguments(
    module: nn.Module,
    names: Iterable[str],
    positional: Sequence[str] = (),
    same_sizes: Sequence[Sequence[tuple[str, int]]] = (),
) -> Iterator[None]:
    """Within, every name of `names` is a parameter of `module.forward`.

    Those that the signature lacks become keyword-only; forward itself still gets them by keyword,
    those in `positional` by position. same_sizes: (argument, axis) pairs whose sizes are one size.
    """
    original = module.forward
    signature = inspect.signature(original)
    parameters = list(signature.parameters.values())
    fits = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = {p.name for p in parameters if p.kind in fits}
    missing = [name for name in names if name not in known or name in positional]
    if not missing and not same_sizes:
        yield
        return

    def forward(*args: Any, **kwargs: Any) -> Any:
        for (first, axis), *others in same_sizes:
            for argument, its_axis in others:
                # torch takes the two for one size from here on.
                assert kwargs[argument].shape[its_axis] == kwargs[first].shape[axis]
        given = [kwargs.pop(name) for name in positional]
        return original(*args, *given, **kwargs)

    kept = [p for p in parameters if p.kind in fits and p.name not in missing]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in missing]
    if positional:
        # What comes before them could not be given by keyword any more.
        kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in kept]
    forward.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
    previous = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if previous is not None:
            module.forward = previous
