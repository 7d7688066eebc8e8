"""All that can be read of a module, for comparison: values bitwise, objects by identity."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig


def state_of(module: nn.Module) -> dict[str, Any]:
    """Path -> what is there. Equal before and after means: nothing was rebound, added, removed or
    written to, in the module and in the containers and configurations on it."""
    found: dict[str, Any] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        for key, value in vars(part).items():
            _describe(f"{name}.{key}", value, found)
    return found


def surroundings() -> tuple[Any, ...]:
    """Process-wide state that a capture must not change."""
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
    )


def _describe(path: str, value: Any, found: dict[str, Any]) -> None:
    if isinstance(value, Tensor):
        data = value.detach().contiguous().flatten().view(torch.uint8) if value.numel() else value
        found[path] = (id(value), type(value), value.requires_grad, data.tolist())
    elif isinstance(value, (dict, OrderedDict)):
        found[path] = (id(value), type(value), [str(key) for key in value])
        for key, item in value.items():
            _describe(f"{path}[{key!r}]", item, found)
    elif isinstance(value, (list, tuple, deque)):
        found[path] = (id(value), type(value), len(value))
        for index, item in enumerate(value):
            _describe(f"{path}[{index}]", item, found)
    elif isinstance(value, PreTrainedConfig):
        found[path] = (id(value), repr(vars(value)))
    elif isinstance(value, (int, float, str, type(None), set)):
        found[path] = (
            type(value),
            value if not isinstance(value, set) else sorted(map(str, value)),
        )
    else:
        found[path] = id(value)
