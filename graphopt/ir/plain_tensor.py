"""What a tensor must be for a graph to compute with it: strided, with memory of its own class.

Capture asks it of the example, a program of what it is called with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

PLAIN_CLASSES = (Tensor, nn.Parameter, nn.Buffer)


def why_not_plain(tensor: Tensor) -> str | None:
    """What is in the way, and what to do, as the end of "input 'x' ..."; None for plain tensors.

    Views, gradients and other strides are no obstacle. The device is the caller's matter, but for
    "meta", where there are no values.
    """
    # Wrapped tensors answer no question about their memory.
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "is inside a transform of torch.func (vmap, grad); call it outside of it"
    if isinstance(tensor, FakeTensor):
        return "is a fake tensor, which has no values; make a real one"
    if tensor.is_nested:
        return "is a nested tensor; pad it (torch.nested.to_padded_tensor) and give a mask"
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        return f"has the layout {layout}; make it dense (.to_dense())"
    if tensor.is_quantized:
        return f"is quantized ({_name(tensor)}); make it floats (.dequantize())"
    if type(tensor) not in PLAIN_CLASSES:
        return (
            f"is a {type(tensor).__name__}, a tensor with rules of its own; make it a plain one "
            "(.as_subclass(torch.Tensor), or what its class has for that)"
        )
    if tensor.is_meta:
        return "is on meta, where tensors have no values; load or make them first"
    if _bytes_spanned(tensor) > tensor.untyped_storage().nbytes():
        return "has no memory behind it any more; its storage was released or shrunk"
    return None


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes_spanned(tensor: Tensor) -> int:
    """Bytes of storage up to the end of the last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.element_size()
