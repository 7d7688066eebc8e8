"""Whether a module can be captured as it stands: its mode, and what it is wrapped in."""

from __future__ import annotations

import torch
from torch import nn

from graphopt.errors import CaptureError


def check_capturable(module: nn.Module) -> None:
    """Raise CaptureError naming what is in the way.

    Every submodule must be in eval mode: one that was left in training mode drops values at random,
    or counts. torch.compile and data-parallel wrappers are not seen through: what they call is not
    what `forward` says.
    """
    if module.training:
        raise CaptureError("the model is in training mode; call model.eval() first")
    for name, part in module.named_modules():
        where = name or "the model"
        if part.training:
            raise CaptureError(
                f"{name} ({type(part).__name__}) is in training mode, though the model is not; "
                "call model.eval(), which sets all of its parts"
            )
        if isinstance(part, torch.jit.ScriptModule):
            raise CaptureError(
                f"{where} is a TorchScript module, whose Python is gone; give the nn.Module that "
                "it was made from"
            )
        if isinstance(part, torch._dynamo.OptimizedModule):
            raise CaptureError(
                f"{where} is wrapped by torch.compile; give the module inside (._orig_mod)"
            )
        if isinstance(part, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            kind = type(part).__name__
            raise CaptureError(f"{where} is wrapped by {kind}; give the module inside (.module)")
