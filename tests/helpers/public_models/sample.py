"""What a file of public_models tells about its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Sample:
    """A model and what is expected of it.

    example: inputs to capture with. others: inputs of two other sizes.
    fused: `explain(program, "fuse_attention").summary`.
    refusal: "" for a causal language model, which is served; else words that the first line of the
        refusal holds (what is in the way).
    dynamic: as of `graphopt.compile`.
    """

    module: nn.Module
    example: Sequence[Tensor]
    others: Sequence[Sequence[Tensor]]
    fused: str
    refusal: str = ""
    dynamic: Mapping[str, Mapping[int, str]] | bool = True


def tokens_of(vocabulary: int) -> Callable[[int, int], tuple[Tensor]]:
    """(batch, length) -> random token ids without 0, which some models take for padding."""
    return lambda batch, length: (torch.randint(1, vocabulary, (batch, length)),)


def lively(module: AnyModule) -> AnyModule:
    """In eval mode, every parameter moved: biases of 0 and norms of 1 would hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    return module.eval()
