"""torch's own transformer layers, captured as they are written.

In eval mode nn.MultiheadAttention and nn.TransformerEncoder may run one opaque op for a layer, and
cut or zero what is padding. nn.TransformerEncoder and nn.TransformerDecoder also compare a mask
with the causal one and, where all elements are equal, leave it out for a flag: values decide about
the road, which no graph can hold. Without the flag the mask itself is applied, to the same effect;
`fuse_attention` reads that it is causal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.modules import transformer


@contextlib.contextmanager
def torch_layers_as_written() -> Iterator[None]:
    """For the time of an export: no fast path, no mask left out for what it holds."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    detect = transformer._detect_is_causal_mask
    torch.backends.mha.set_fastpath_enabled(False)
    transformer._detect_is_causal_mask = _said_to_be_causal
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = detect
        torch.backends.mha.set_fastpath_enabled(was_enabled)


def _said_to_be_causal(
    mask: Tensor | None, is_causal: bool | None = None, size: int | None = None
) -> bool:
    """What the caller said of a mask; torch looks at its values when nothing was said."""
    del mask, size
    return is_causal is True
