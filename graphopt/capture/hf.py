"""Road (a) of attention capture: graphopt registers itself with Hugging Face transformers.

While `attention_hooks(model)` is active, every layer that goes through transformers' attention
interface calls `graphopt::attention` with its own scale, window, softcap and sinks and with
un-repeated key/value heads. Masks come as *meanings*: the mask factory receives transformers'
composed index function, which is taken apart; only causal, bidirectional and sliding-window terms
(and the packed-sequence term that an iota of positions makes trivially true) are represented by
attributes, plus the 2-D padding mask. Everything else stays a dense mask operand, built by
transformers itself. Nothing is ever dropped silently: a mask object that the layer receives but
that this module did not make is passed on densely or raises. Layers that do not go through the
attention interface must not see these masks at all: `mask_marker.py` finds their readers, and
capture starts over with transformers' own masks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from graphopt.capture.mask_marker import mark
from graphopt.errors import CaptureError
from graphopt.ops.registry import load_all

NAME = "graphopt"


@dataclass(frozen=True, slots=True)
class MaskMeaning:
    """What a mask says, as attributes of the attention op. `dense`: it could not be said."""

    causal: bool = False
    window: int = 0
    padded: bool = False
    dense: bool = False


class _Session:
    """The masks made during one capture, recognised again by identity when a layer gets them."""

    def __init__(self, positions_given: bool, eager: Collection[int] = ()) -> None:
        self.positions_given = positions_given
        # Ids of the configurations that asked for transformers' eager attention.
        self.eager = frozenset(eager)
        self._made: list[tuple[Tensor, MaskMeaning]] = []

    def remember(self, mask: Tensor, meaning: MaskMeaning) -> Tensor:
        self._made.append((mask, meaning))
        return mask

    def meaning(self, mask: Tensor) -> MaskMeaning | None:
        return next((meaning for made, meaning in self._made if made is mask), None)


_SESSIONS: list[_Session] = []


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    names = function.__code__.co_freevars
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def read_mask_function(function: Callable[..., Any], positions_given: bool) -> MaskMeaning:
    """Take transformers' composed mask function apart.

    positions_given: the caller passes position ids, so packed-sequence terms carry information.
    Without them positions are an iota and those terms hold for every pair.
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
        return MaskMeaning(
            causal=any(part.causal for part in parts),
            window=min(windows, default=0),
            dense=any(part.dense for part in parts),
        )
    if not positions_given:
        if name.startswith("packed_sequence_mask_function."):
            return MaskMeaning()
        if name.startswith("remap_positions_for_packed_sequence."):
            return read_mask_function(inner["mask_function"], positions_given)
    return MaskMeaning(dense=True)


def _graphopt_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask factory protocol; returns a 2-D tensor for a meaning, 4-D if dense."""
    if args or not _SESSIONS:
        raise CaptureError(
            "transformers called graphopt's mask function outside a capture or with unknown "
            "arguments; supported: transformers 5.x, through graphopt.capture"
        )
    session = _SESSIONS[-1]
    padding: Tensor | None = kwargs.get("attention_mask")
    meaning = read_mask_function(kwargs["mask_function"], session.positions_given)
    offsets = kwargs.get("q_offset", 0), kwargs.get("kv_offset", 0)
    if any(isinstance(o, Tensor) or o != 0 for o in offsets):
        meaning = MaskMeaning(dense=True)
    # A window without causality is two-sided in transformers and has its own function.
    if meaning.dense or (meaning.window and not meaning.causal):
        dense = dict(kwargs, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        return session.remember(sdpa_mask(**dense), MaskMeaning(dense=True))
    if padding is not None:
        meaning = MaskMeaning(meaning.causal, meaning.window, padded=True)
        return session.remember(mark(padding.to(torch.bool)), meaning)
    batch, length = kwargs["batch_size"], kwargs["kv_length"]
    device = kwargs.get("device", torch.device("cpu"))
    token = torch.ones((batch, length), dtype=torch.bool, device=device)
    return session.remember(mark(token), meaning)


def _graphopt_attention(
    module: nn.Module,
    query_BHSD: Tensor,
    key_BGTD: Tensor,
    value_BGTE: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface."""
    layer = type(module).__name__
    if dropout:
        raise CaptureError(f"{layer} runs with dropout {dropout}; call model.eval() before capture")
    mask: Tensor | None = None
    padding: Tensor | None = None
    causal = False
    window = 0
    if attention_mask is None:
        causal = bool(is_causal if is_causal is not None else getattr(module, "is_causal", True))
        if sliding_window:
            raise CaptureError(
                f"{layer} asks for a sliding window of {sliding_window} without a mask; "
                "use attn_implementation='sdpa' for this model"
            )
    else:
        meaning = _SESSIONS[-1].meaning(attention_mask) if _SESSIONS else None
        if meaning is None or meaning.dense:
            if attention_mask.ndim != 4:
                raise CaptureError(
                    f"{layer} received a {attention_mask.ndim}-D mask that graphopt did not make; "
                    "only 4-D masks can be kept as they are"
                )
            mask = attention_mask
        else:
            causal, window = meaning.causal, meaning.window
            padding = attention_mask if meaning.padded else None
            if sliding_window and not meaning.window:
                raise CaptureError(
                    f"{layer} asks for a sliding window of {sliding_window}, but its mask has none"
                )
    if position_bias is not None:
        if mask is None:
            mask = position_bias
        elif mask.dtype == torch.bool:
            mask = torch.where(mask, position_bias, torch.finfo(position_bias.dtype).min)
        else:
            mask = mask + position_bias
    is_eager = bool(_SESSIONS) and id(getattr(module, "config", None)) in _SESSIONS[-1].eager
    may_hide_all = is_eager and (mask is not None or padding is not None)
    out_BHSE = torch.ops.graphopt.attention(
        query_BHSD,
        key_BGTD,
        value_BGTE,
        mask,
        padding,
        s_aux,
        scale=float(scaling if scaling is not None else query_BHSD.shape[-1] ** -0.5),
        causal=causal,
        window=window,
        softcap=float(softcap or 0.0),
        hidden=_eager_low(query_BHSD.dtype) if may_hide_all else "",
        empty_is_nan=may_hide_all,
    )
    return out_BHSE.transpose(1, 2).contiguous(), None


def _eager_low(dtype: torch.dtype) -> str:
    """What transformers' eager attention makes of a hidden score: it adds the type's lowest number
    to it, where SDPA puts minus infinity."""
    low = torch.finfo(dtype).min
    return f"f16(s + {low!r})" if dtype == torch.float16 else repr(low)


@contextmanager
def attention_hooks(model: PreTrainedModel, positions_given: bool) -> Iterator[None]:
    """Route the model's attention through graphopt.

    The model's own attention setting is restored on exit.
    """
    load_all()
    ALL_ATTENTION_FUNCTIONS.register(NAME, _graphopt_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _graphopt_mask)
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    previous = {key: config._attn_implementation for key, config in configs.items()}
    eager = [key for key, name in previous.items() if name == "eager"]
    session = _Session(positions_given, eager)
    _SESSIONS.append(session)
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield
    finally:
        _SESSIONS.remove(session)
        for key, config in configs.items():
            config._attn_implementation = previous[key]
