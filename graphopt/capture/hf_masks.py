"""Masks of transformers as *meanings*.

transformers hands its mask factory an index function composed of known terms. It is taken apart;
only causal, bidirectional and sliding-window terms, and the packed-sequence term where positions
are an iota, are represented by attributes of attention, plus the 2-D padding mask. Everything else
stays a dense mask operand, built by transformers itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

from graphopt.capture.mask_marker import mark
from graphopt.errors import CaptureError


@dataclass(frozen=True, slots=True)
class MaskMeaning:
    """What a mask says, as attributes of the attention op.

    dense: it could not be said. positions: it was said on the condition that these are an iota.
    """

    causal: bool = False
    window: int = 0
    padded: bool = False
    dense: bool = False
    positions: Tensor | None = None


class MadeMasks:
    """The masks made during one capture, recognised again by identity when a layer gets them."""

    def __init__(self, positions_given: bool) -> None:
        self._positions_given = positions_given
        self._made: list[tuple[Tensor, MaskMeaning]] = []

    def meaning(self, mask: Tensor) -> MaskMeaning | None:
        """None for a mask that was not made here."""
        return next((meaning for made, meaning in self._made if made is mask), None)

    def make(self, *args: Any, **kwargs: Any) -> Tensor:
        """transformers' mask factory protocol; a 2-D tensor for a meaning, 4-D if dense."""
        if args:
            raise CaptureError(
                "transformers called its mask function with positional arguments; supported: "
                "transformers 5.x"
            )
        padding: Tensor | None = kwargs.get("attention_mask")
        meaning = read_mask_function(kwargs["mask_function"], self._positions_given)
        offsets = kwargs.get("q_offset", 0), kwargs.get("kv_offset", 0)
        if any(isinstance(o, Tensor) or o != 0 for o in offsets):
            meaning = MaskMeaning(dense=True)
        if padding is not None and meaning.positions is not None:
            meaning = MaskMeaning(dense=True)
        # A window without causality is two-sided in transformers and has its own function.
        if meaning.dense or (meaning.window and not meaning.causal):
            dense = dict(kwargs, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
            return self._remember(sdpa_mask(**dense), MaskMeaning(dense=True))
        if padding is not None:
            meaning = replace(meaning, padded=True)
            token = padding.to(torch.bool)
        else:
            sizes = kwargs["batch_size"], kwargs["kv_length"]
            device = kwargs.get("device", torch.device("cpu"))
            token = torch.ones(sizes, dtype=torch.bool, device=device)
        return self._remember(mark(token, meaning.positions), meaning)

    def _remember(self, mask: Tensor, meaning: MaskMeaning) -> Tensor:
        self._made.append((mask, meaning))
        return mask


def read_mask_function(function: Callable[..., Any], positions_given: bool) -> MaskMeaning:
    """Take transformers' composed mask function apart.

    positions_given: the caller passes position ids, so packed-sequence terms carry information.
    Without them positions are made by the model; those terms hold for every pair where it makes an
    iota, which `mask_marker.take_out` checks.
    """
    name = getattr(function, "__qualname__", "")
    inner = _closure(function) if hasattr(function, "__code__") else {}
    if name == "causal_mask_function":
        return MaskMeaning(causal=True)
    if name == "bidirectional_mask_function":
        return MaskMeaning()
    if name.startswith("sliding_window_overlay."):
        return MaskMeaning(window=int(inner["sliding_window"]))
    if name.startswith("and_masks."):
        parts = [read_mask_function(part, positions_given) for part in inner["mask_functions"]]
        windows = {part.window for part in parts if part.window}
        packed = any(_is_packed(part) for part in inner["mask_functions"])
        positions = next((p.positions for p in parts if p.positions is not None), None)
        return MaskMeaning(
            causal=any(part.causal for part in parts),
            window=min(windows, default=0),
            dense=any(part.dense for part in parts) or (packed and positions is None),
            positions=positions,
        )
    if not positions_given:
        if _is_packed(function):
            return MaskMeaning()
        if name.startswith("remap_positions_for_packed_sequence."):
            meaning = read_mask_function(inner["mask_function"], positions_given)
            return replace(meaning, positions=inner["position_ids"])
    return MaskMeaning(dense=True)


def _is_packed(function: Callable[..., Any]) -> bool:
    name = getattr(function, "__qualname__", "")
    return name.startswith("packed_sequence_mask_function.")


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    names = function.__code__.co_freevars
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
