"""Whether a module can be captured as it stands: its modes, its hooks, what it is wrapped in."""

from __future__ import annotations

from collections.abc import Container, Iterator

import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from graphopt.errors import CaptureError
from graphopt.ir.plain_tensor import why_not_plain

_WRAPPERS: tuple[tuple[type[nn.Module], str, str], ...] = (
    (torch._dynamo.OptimizedModule, "torch.compile", "_orig_mod"),
    (nn.DataParallel, "DataParallel", "module"),
    (nn.parallel.DistributedDataParallel, "DistributedDataParallel", "module"),
)


def check_capturable(module: nn.Module, is_positional: bool) -> None:
    """Raise CaptureError naming what is in the way.

    Every submodule must be in eval mode: one left in training mode drops values at random, or
    counts. Wrappers are not seen through: what they call is not what their `forward` says. The
    model's own hooks are captured, but not hooks on all modules, which torch.export's modules get
    too.
    is_positional: the example gives positional arguments, of which capture makes keyword arguments.
    """
    for name, part in module.named_modules():
        where = f"{name} ({type(part).__name__})" if name else "the model"
        for kind, wrapper, inside in _WRAPPERS:
            if isinstance(part, kind):
                raise CaptureError(
                    f"{where} is wrapped by {wrapper}; give the module inside (.{inside})"
                )
        for attribute, value in vars(part).items():
            if isinstance(value, Iterator):
                raise CaptureError(
                    f"{where} holds an iterator ({attribute}), which a capture would use up; keep "
                    "what it goes over instead"
                )
        if isinstance(part, torch.jit.ScriptModule):
            raise CaptureError(
                f"{where} is a TorchScript module, whose Python is gone; give the nn.Module that "
                "it was made from"
            )
        if part.training:
            too = ", though the model is not" if name else ""
            raise CaptureError(f"{where} is in training mode{too}; call model.eval() first")
        for own in (*part._parameters.values(), *part._buffers.values()):
            if own is not None and nn.parameter.is_lazy(own):
                raise CaptureError(f"{where} has no weights yet; call the model once first")
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        raise CaptureError(
            "a forward hook is registered on all modules (register_module_forward_hook or "
            "register_module_forward_pre_hook); remove it during capture, or register it on the "
            "modules that it is meant for"
        )
    pre_hooks = set(module._forward_pre_hooks) - set(module._forward_pre_hooks_with_kwargs)
    if is_positional and pre_hooks:
        raise CaptureError(
            "the model has a forward pre-hook of its own that takes positional arguments, and "
            "capture gives them by keyword; register it with with_kwargs=True, or on a submodule"
        )
    if any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
        raise CaptureError(
            "capture runs inside torch.autocast, whose casts are no part of the model; leave the "
            "block, or use autocast inside forward"
        )


def check_weights(module: nn.Module, packed: Container[str]) -> None:
    """Raise CaptureError naming a parameter or buffer that has no values, or is no plain tensor.

    packed: names of parameters that stay on the meta device, because a low-bit weight stands for
    them.
    """
    own = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    stood_for = {id(tensor) for name, tensor in own if name in packed}
    for name, tensor in own:
        reason = None if id(tensor) in stood_for else why_not_plain(tensor)
        if reason is not None:
            raise CaptureError(f"weight {name!r} {reason}")
