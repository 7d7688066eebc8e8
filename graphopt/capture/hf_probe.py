"""Whether the stand-in of a layer's attention computes what the layer's own function computes.

`graphopt::attention` was put where the function stood. Both are run once on the same small random
tensors, with the layer's own module, arguments, head counts and widths; a layer whose function does
more (reads an attribute of its module, changes the scale, ignores the mask) shows here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from graphopt.capture.hf_layers import FLASH, LayerCall
from graphopt.ops import attention

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
ROUNDED = 5e-2
"""Tolerance of the 16-bit types, relative to the largest value like the others."""

BATCH, QUERIES, OTHER_KEYS = 2, 6, 9


def difference_found(calls: Sequence[LayerCall]) -> str | None:
    """The first layer whose own function computes something else, in words; None when all agree."""
    for call in calls:
        # The flash functions run on accelerators only, and define the same arguments.
        if call.own in FLASH:
            continue
        try:
            error = _error(call)
        except Exception as failure:
            reason = str(failure).partition("\n")[0]
            return f"{call.layer}: its attention function could not be checked ({reason})"
        if not error <= TOLERANCES.get(call.dtype, ROUNDED):
            return (
                f"{call.layer}: its attention function computes something else than "
                f"graphopt::attention (relative difference {error:.1e})"
            )
    return None


@torch.no_grad()
def _error(call: LayerCall) -> float:
    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=call.device).to(call.dtype)

    keys = QUERIES if call.is_square else OTHER_KEYS
    q_BHSD = random(BATCH, call.heads, QUERIES, call.width)
    k_BGTD = random(BATCH, call.groups, keys, call.width)
    v_BGTE = random(BATCH, call.groups, keys, call.value_width)
    arguments: dict[str, Any] = dict(call.arguments)
    own_mask, mask = _masks(call, keys)
    sinks: Tensor | None = None
    if call.sinks is not None:
        sinks = getattr(call.module, call.sinks) if call.sinks else random(call.heads)
        arguments["s_aux"] = sinks
    if call.bias_heads:
        bias = random(1, call.bias_heads, QUERIES, keys)
        arguments["position_bias"] = bias
        mask = bias if mask is None else torch.where(mask, bias, torch.finfo(call.dtype).min)
    own = call.own(call.module, q_BHSD, k_BGTD, v_BGTE, own_mask, **arguments)[0]
    ours = attention.reference(
        q_BHSD,
        k_BGTD,
        v_BGTE,
        mask,
        sinks_H=sinks,
        scale=call.scale,
        causal=call.causal,
        softcap=call.softcap,
    ).transpose(1, 2)
    if own.shape != ours.shape:
        return float("inf")
    return float((own.double() - ours.double()).abs().max() / ours.double().abs().max())


def _masks(call: LayerCall, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """A random mask as the layer's function gets it, and as bool; every query sees a key."""
    if call.mask is None:
        return None, None
    visible = torch.rand(BATCH, 1, QUERIES, keys, device=call.device) < 0.6
    visible[..., 0] = True
    # For one of graphopt's stands what the model makes: bool for SDPA, added for eager functions.
    is_bool = call.own is sdpa_attention_forward if call.is_own_mask else call.mask == torch.bool
    if is_bool:
        return visible, visible
    added = torch.zeros(visible.shape, dtype=call.dtype, device=call.device)
    return added.masked_fill(~visible, torch.finfo(call.dtype).min), visible
