"""What stands in for the attention function of a transformers layer while it is captured.

Each layer calls `graphopt::attention` with its own scale, window, softcap and sinks and with
un-repeated key/value heads. An argument that is not represented, and that does not belong to
`IGNORED`, is a reason to capture the model as it is. So is an attention function that is not
transformers' own. What transformers' own functions compute is not taken on trust either: every call
is written down, and `hf_probe` compares the two afterwards.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from graphopt.capture.hf_masks import MadeMasks
from graphopt.capture.mask_marker import weights_of
from graphopt.errors import CaptureError

Function = Callable[..., Any]
FLASH = (flash_attention_forward, flex_attention_forward)
WITHOUT_WEIGHTS = (sdpa_attention_forward, *FLASH)
"""Functions that return None for the attention weights."""

IGNORED = {
    "output_attentions": "says what is returned; who reads the weights is checked",
    "output_hidden_states": "says what the model returns",
    "output_router_logits": "says what the model returns",
    "return_dict": "says what the model returns",
    "use_cache": "there is no cache in a capture",
    "num_items_in_batch": "scales the loss",
}
"""Arguments that no attention function of transformers computes with, and why."""

FLASH_ONLY = (
    *("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    *("deterministic", "target_dtype", "seq_idx"),
)
"""Arguments that only the flash functions compute with."""


class NotRepresentedError(CaptureError):
    """The model's attention cannot be said with `graphopt::attention`: capture it as it is."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerCall:
    """One call of a layer's attention function, without its tensors.

    own: the function that stood there. heads, groups, width, value_width: H, G, D, E.
    is_square: as many keys as queries. mask: its dtype, None without one; is_own_mask: graphopt
    made it; causal: what is said where there is none.
    sinks: name of the module's parameter, "" for a tensor from elsewhere, None without.
    bias_heads: size of the bias' head axis, 0 without one. arguments: all others, without tensors.
    """

    layer: str
    module: nn.Module
    own: Function
    dtype: torch.dtype
    device: torch.device
    heads: int
    groups: int
    width: int
    value_width: int
    is_square: bool
    mask: torch.dtype | None
    is_own_mask: bool
    causal: bool
    scale: float
    softcap: float
    sinks: str | None
    bias_heads: int
    arguments: dict[str, Any] = field(repr=False)


class Layers:
    """Makes the stand-ins of one capture. calls: what went through them, in order."""

    def __init__(self, model: nn.Module, masks: MadeMasks) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._masks = masks
        self.calls: list[LayerCall] = []

    def stand_in(self, own: Function) -> Function:
        """For `own`, with transformers' attention interface."""

        def attention(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None = None,
            *args: Any,
            **options: Any,
        ) -> tuple[Tensor, Tensor | None]:
            layer = f"{self._names.get(id(module), '')} ({type(module).__name__})".lstrip()
            if not is_of_transformers(own):
                raise NotRepresentedError(f"{layer} uses the attention function {_named(own)}")
            if args:
                raise NotRepresentedError(f"{layer} gives its attention function unnamed options")
            asked = _Options(layer, own, options)
            return self._attend(asked, module, query, key, value, attention_mask)

        return attention

    def _attend(
        self,
        asked: _Options,
        module: nn.Module,
        q_BHSD: Tensor,
        k_BGTD: Tensor,
        v_BGTE: Tensor,
        given: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        layer = asked.layer
        meaning = None if given is None else self._masks.meaning(given)
        mask: Tensor | None = None
        padding: Tensor | None = None
        causal, window = False, 0
        if given is None:
            stated = asked.is_causal
            causal = bool(stated if stated is not None else getattr(module, "is_causal", True))
            if asked.window:
                raise NotRepresentedError(
                    f"{layer} asks for a sliding window of {asked.window} without a mask"
                )
        elif meaning is None or meaning.dense:
            if given.ndim != 4:
                raise NotRepresentedError(f"{layer} received a {given.ndim}-D mask of its own")
            mask = given
        else:
            causal, window = meaning.causal, meaning.window
            # Without padding the operand only carries the condition on positions to the graph.
            padding = given if meaning.padded or meaning.positions is not None else None
            if asked.window and not meaning.window:
                raise NotRepresentedError(
                    f"{layer} asks for a sliding window of {asked.window}, but its mask has none"
                )
        has_weights = asked.own not in WITHOUT_WEIGHTS
        may_hide_all = has_weights and (mask is not None or padding is not None)
        unmasked_causal = given is None and causal
        qkv = q_BHSD, k_BGTD, v_BGTE
        self.calls.append(asked.call(module, qkv, given, meaning, unmasked_causal))
        out_BHSE: Tensor = torch.ops.graphopt.attention(
            q_BHSD,
            k_BGTD,
            v_BGTE,
            _with_bias(mask, asked.bias),
            padding,
            asked.sinks,
            scale=asked.scale(q_BHSD),
            causal=causal,
            window=window,
            softcap=asked.softcap,
            hidden=_eager_low(q_BHSD.dtype) if may_hide_all else "",
            empty_is_nan=may_hide_all,
        )
        weights = weights_of(q_BHSD, k_BGTD) if has_weights else None
        return out_BHSE.transpose(1, 2).contiguous(), weights


class _Options:
    """What a layer tells its attention function beside tensors and mask.

    Raises NotRepresentedError for what has no place in `graphopt::attention`.
    """

    def __init__(self, layer: str, own: Function, options: dict[str, Any]) -> None:
        self.layer = layer
        self.own = own
        options = {name: value for name, value in options.items() if value is not None}
        self._scaling: float | None = options.pop("scaling", None)
        self.is_causal: bool | None = options.pop("is_causal", None)
        self.window: int = options.pop("sliding_window", 0)
        self.softcap = float(options.pop("softcap", 0.0))
        self.sinks: Tensor | None = options.pop("s_aux", None)
        self.bias: Tensor | None = options.pop("position_bias", None)
        if options.pop("dropout", 0.0):
            raise NotRepresentedError(f"{layer} drops attention weights at random")
        if self.sinks is not None and self.sinks.ndim != 1:
            raise NotRepresentedError(f"{layer} has sinks (s_aux=) that depend on the input")
        for name in options:
            if name in IGNORED or (name in FLASH_ONLY and own not in FLASH):
                continue
            raise NotRepresentedError(
                f"{layer} gives its attention function {name}=, which graphopt does not know"
            )
        self._ignored = {n: v for n, v in options.items() if not isinstance(v, Tensor)}

    def scale(self, q_BHSD: Tensor) -> float:
        return float(self._scaling if self._scaling is not None else q_BHSD.shape[-1] ** -0.5)

    def call(
        self,
        module: nn.Module,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        meaning: object,
        causal: bool,
    ) -> LayerCall:
        q_BHSD, k_BGTD, v_BGTE = qkv
        arguments = dict(self._ignored)
        known = {"scaling": self._scaling, "is_causal": self.is_causal}
        known |= {"sliding_window": self.window or None, "softcap": self.softcap or None}
        arguments |= {name: value for name, value in known.items() if value is not None}
        parameters = module.__dict__.get("_parameters", {})
        sinks = next((name for name, p in parameters.items() if p is self.sinks), "")
        return LayerCall(
            layer=self.layer,
            module=module,
            own=self.own,
            dtype=q_BHSD.dtype,
            device=q_BHSD.device,
            heads=int(q_BHSD.shape[1]),
            groups=int(k_BGTD.shape[1]),
            width=int(q_BHSD.shape[3]),
            value_width=int(v_BGTE.shape[3]),
            # Comparing the sizes themselves would bind them to each other.
            is_square=str(q_BHSD.shape[2]) == str(k_BGTD.shape[2]),
            mask=None if mask is None else mask.dtype,
            is_own_mask=meaning is not None,
            causal=causal,
            scale=self.scale(q_BHSD),
            softcap=self.softcap,
            sinks=None if self.sinks is None else sinks,
            bias_heads=0 if self.bias is None else int(self.bias.shape[-3]),
            arguments=arguments,
        )


def is_of_transformers(function: Function) -> bool:
    """Whether it is written in transformers' own files, whatever name it was registered under."""
    code = getattr(function, "__code__", None)
    folder = os.path.dirname(transformers.__file__) + os.sep
    return function in FLASH or (code is not None and code.co_filename.startswith(folder))


def _eager_low(dtype: torch.dtype) -> str:
    """What transformers' eager attention makes of a hidden score: it adds the type's lowest number
    to it, where SDPA puts minus infinity."""
    low = torch.finfo(dtype).min
    return f"f16(s + {low!r})" if dtype == torch.float16 else repr(low)


def _with_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """One operand for both, as transformers puts them together."""
    if mask is None or bias is None:
        return bias if mask is None else mask
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return mask + bias


def _named(function: Function) -> str:
    name = getattr(function, "__qualname__", type(function).__name__)
    code = getattr(function, "__code__", None)
    line = f" ({os.path.basename(code.co_filename)}:{code.co_firstlineno})" if code else ""
    return f"{name}{line}, which is not transformers' own"
