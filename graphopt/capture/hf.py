"""Road (a) of attention capture: graphopt stands in for transformers' attention functions.

While `attention_hooks(model)` is active in a thread, the attention interface of transformers hands
that thread `hf_layers.Layers` in place of the functions it holds, and its mask interface
`hf_masks.MadeMasks`. The model's settings stay as they are, so it takes the branches that it takes
when it runs. Nothing is dropped: what `graphopt::attention` cannot say, a function of the user's
own, or a mask factory of the user's own raise `NotRepresentedError`; what the stand-ins changed
beyond attention is found in the graph by `mask_marker.take_out`, and in numbers by `hf_probe`. For
any of these capture starts over with the model as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel, masking_utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from transformers.utils.generic import GeneralInterface

from graphopt.capture.hf_layers import Layers, NotRepresentedError
from graphopt.capture.hf_masks import MadeMasks
from graphopt.ir.opset import load_all

_LOCK = threading.RLock()
"""Held by the one capture that has changed transformers' interfaces."""

_OWN_MASKS = (
    masking_utils.sdpa_mask,
    masking_utils.eager_mask,
    masking_utils.flash_attention_mask,
    masking_utils.flex_attention_mask,
)
_Lookup = Callable[[GeneralInterface, str], Any]


@contextmanager
def attention_hooks(model: PreTrainedModel, positions_given: bool) -> Iterator[Layers]:
    """Route the model's attention through graphopt, in this thread; what went through it.

    positions_given: see `hf_masks.read_mask_function`.
    """
    load_all()
    masks = MadeMasks(positions_given)
    layers = Layers(model, masks)
    thread = threading.get_ident()
    get_interface = AttentionInterface.get_interface
    is_looking_up = False

    def function_of(self: AttentionInterface, implementation: str, default: Any) -> Any:
        nonlocal is_looking_up
        if threading.get_ident() != thread:
            return get_interface(self, implementation, default)
        is_looking_up = True
        try:
            own = get_interface(self, implementation, default)
        finally:
            is_looking_up = False
        return layers.stand_in(own)

    def function_at(self: GeneralInterface, name: str) -> Any:
        own = GeneralInterface.__getitem__(self, name)
        is_other = threading.get_ident() != thread or is_looking_up
        return own if is_other else layers.stand_in(own)

    def mask_at(self: GeneralInterface, name: str) -> Any:
        own = GeneralInterface.__getitem__(self, name)
        if threading.get_ident() != thread:
            return own
        if own not in _OWN_MASKS:
            raise NotRepresentedError(
                f"the masks of attention {name!r} are made by {getattr(own, '__qualname__', own)}, "
                "which is not transformers' own"
            )
        return masks.make

    with (
        _LOCK,
        _replaced(AttentionInterface, "get_interface", function_of),
        _replaced(AttentionInterface, "__getitem__", function_at),
        _replaced(AttentionMaskInterface, "__getitem__", mask_at),
    ):
        yield layers


@contextmanager
def _replaced(owner: type, name: str, value: Any) -> Iterator[None]:
    previous = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if previous is None:
            delattr(owner, name)
        else:
            setattr(owner, name, previous)
