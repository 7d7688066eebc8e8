"""A limit on how many parts a module may be built of.

A configuration says in many ways how often something is repeated, and building a million layers
takes an hour although none of them needs memory. Whatever the setting is called, the parts can be
counted as they are put together.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)


class TooManyPartsError(Exception):
    """More modules and parameters than the limit."""


@contextmanager
def limited_parts(most: int) -> Iterator[None]:
    """Modules built inside, by this thread, have at most `most` modules and parameters together.

    Raises TooManyPartsError out of the constructor that goes beyond it.
    """
    thread = threading.get_ident()
    count = 0

    def counted(_module: nn.Module, _name: str, _part: object) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            count += 1
            if count > most:
                raise TooManyPartsError(f"it has more than {most} modules and parameters")

    handles = (
        register_module_module_registration_hook(counted),
        register_module_parameter_registration_hook(counted),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
