"""What capture starts from: a module, and beside it the weights that stay low-bit.

`models.load` returns a `ModelSource`; a plain nn.Module is wrapped into one by `compile`.
Parameters whose data stay packed are on the `meta` device: running such a module eagerly fails
loudly, and capture needs only their shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from graphopt.ir.weights import PackedWeight


@dataclass(frozen=True, slots=True, eq=False)
class ModelSource:
    """A model ready to be captured.

    module: the model in eval mode. Parameters named in `packed` may be on the meta device.
    packed: fully qualified parameter name -> low-bit weight that stands for it.
    tokenizer: a Hugging Face tokenizer, or None for models without text.
    eos_token_ids: tokens that end generation.
    sampling: fields of `SamplingParams` that are the model's defaults, in plain values.
    notes: what its files ask for that is a default only, or that nobody reads; goes to the report.
    """

    module: nn.Module
    name: str
    packed: Mapping[str, PackedWeight] = field(default_factory=dict)
    tokenizer: Any = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    sampling: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
