"""Building a module whose parameters take no memory while its buffers are real.

`torch.device("meta")` would also put buffers there, and with them the rotary frequencies that only
the module's constructor knows how to compute.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Modules built inside, by this thread, get their parameters on the meta device.

    Each parameter is allocated for a moment, uninitialised, before it is replaced; initialisers
    that run afterwards see a meta tensor and do nothing.
    """
    thread = threading.get_ident()

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        # A parameter that is already meta is kept itself, so tied ones stay tied.
        if threading.get_ident() != thread or parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    # torch annotates the hook as returning None, and uses what it returns all the same.
    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
