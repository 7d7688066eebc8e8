"""Refusals of capture: what in the model is in the way, at which line, and what to do.

torch.export fails in its own words, from deep inside. `refusal` reads such an exception into one
first line

    <model> cannot be captured: <what> at model.py:12 (`the line itself`); <what to do>

and leaves torch's text below it. `_RULES` is the table; an exception that no rule knows came out of
the model's own code as a rule, so its own text and its innermost line of the model are shown.
"""

from __future__ import annotations

import os.path
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, fx

from graphopt.capture.size_decisions import is_model_file
from graphopt.errors import CaptureError
from graphopt.ir.shapes import told_dtypes

_FIXED = "dynamic=False captures the model for the sizes of the example alone"
_PURE = "graphopt captures forwards that only compute"
_ON_DATA = (
    "a captured graph has one road for all values: compute both ways and choose with torch.where, "
    "or pass the value as a Python argument, which is burnt in"
)
_WHOLE = "take this call out of forward, or replace it with ordinary tensor operations"


@dataclass(frozen=True, slots=True)
class Rule:
    """One way in which a capture fails.

    kind: name of the exception's class, "" for any. text: pattern that its text must contain.
    what: what is in the way; "{0}" is the first group of `text`. mend: what to do.
    """

    kind: str
    text: str
    what: str
    mend: str


_RULES = (
    Rule(
        "GuardOnDataDependentSymNode",
        r"Could not extract specialized integer",
        "a value of a tensor becomes a Python number (.item(), int(...), or a size)",
        "pass the number as a Python argument, which is burnt in, or keep it in a tensor",
    ),
    Rule(
        "GuardOnDataDependentSymNode",
        r"\(Size-like symbols: (?!none)\w+",
        "Python branches on a size that depends on the values of a tensor (nonzero, a boolean "
        "index)",
        "keep the full size and use torch.where, or masked_fill, on it",
    ),
    Rule(
        "GuardOnDataDependentSymNode",
        r"",
        "Python branches on the value of a tensor (.item(), `if tensor:`)",
        _ON_DATA,
    ),
    Rule(
        "DataDependentOutputException",
        r"(aten\.\w+)",
        "Python reads a value of a tensor through {0}",
        _ON_DATA,
    ),
    Rule(
        "DynamicOutputShapeException",
        r"(aten\.\w+)",
        "the result of {0} has a size that depends on the values of a tensor",
        "keep the full size and use torch.where, or masked_fill, on it",
    ),
    Rule(
        "UnsupportedOperatorException",
        r"aten\._nested_tensor",
        "a nested tensor is made",
        "use a padded tensor with a mask (for nn.TransformerEncoder: enable_nested_tensor=False)",
    ),
    Rule(
        "UnsupportedOperatorException",
        r"(aten\.\w*sparse\w*)",
        "a sparse tensor is made or read ({0}), a layout graphopt does not have",
        "use dense tensors (.to_dense)",
    ),
    Rule(
        "UnsupportedOperatorException",
        r"([\w:]+\.\w+)",
        "torch cannot tell the shape that {0} gives",
        "register a fake implementation of it with torch.library.register_fake",
    ),
    Rule(
        "",
        r"no fake impl registered for <?\w*\(?([\w:]+)",
        "torch cannot tell the shape that the custom op {0} gives",
        "register a fake implementation with its .register_fake",
    ),
    Rule(
        "",
        r"Operator (\S+) does not support running with fake tensors",
        "torch cannot tell the shape that {0} gives",
        "register a fake implementation of it with torch.library.register_fake",
    ),
    Rule(
        "",
        r"Cannot access data pointer of Tensor|Cannot access data pointer of Storage",
        "the memory of a tensor is read (a copy of a module, a custom kernel, a save)",
        f"{_WHOLE}; a kernel of your own must be an op (torch.library.custom_op)",
    ),
    Rule(
        "",
        r"\.numpy\(\) is not supported",
        "a tensor is turned into a numpy array",
        "use the torch function instead, or compute the array once outside of forward and keep it "
        "as a buffer",
    ),
    Rule(
        "",
        r"unhashable type: .*Sym(?:Int|Float|Bool)",
        "a size is the key of a cache or a dict (lru_cache, self.cache[n])",
        f"compute the value without the cache, or fix the size: {_FIXED}",
    ),
    Rule(
        "",
        r"must be (\w+), not Sym(?:Int|Bool|Float)",
        "a function that wants a plain {0} gets one that depends on a size",
        f"write it as an if, or fix the size: {_FIXED}",
    ),
    Rule(
        "",
        r"Expected cond to be True|must be a closure|torch\.cond|while_loop",
        "torch's control flow (torch.cond, while_loop) is used in a way torch.export does not take",
        "compute both ways and choose with torch.where",
    ),
    Rule(
        "",
        r"Found (<class '[^']+'>) in output",
        "forward returns an object of {0}",
        "return a tensor, or a tuple, list or dict of tensors",
    ),
    Rule(
        "",
        r"fake tensor in the exported program constant's list(?:.*model attribute: ([\w.]+))?",
        "a tensor is made behind torch's back from an input or a traced value (.data, "
        "torch.tensor of a tensor, a tensor kept on the module: {0})",
        "use .detach() in place of .data, and keep no tensor of a call on the module",
    ),
    Rule(
        "",
        r"[Uu]nsupported input type|Unsupported argument type|not a supported.* type.*input",
        "the example holds an argument of a type that torch.export does not take",
        "pass tensors, numbers, strings, None, or tuples, lists and dicts of them",
    ),
    Rule(
        "",
        r"(LinearPackedParamsBase|ConvPackedParamsBase|PackedParams\w*|__obj_flatten__)",
        "the model holds quantised modules of torch.ao (packed parameters)",
        "capture the float model; graphopt has low-bit weights of its own, from GGUF files",
    ),
    Rule(
        "",
        r"on device (meta) is not on the expected device|on the expected device (meta)",
        "a tensor without data (device meta) meets one with data",
        "load the weights, or model.to_empty(device='cpu'), before capture",
    ),
    Rule(
        "",
        r"on device (\w+).* is not on the expected device (\w+)|Expected all tensors to be on the "
        r"same device|two devices|Unhandled FakeTensor Device Propagation",
        "tensors of different devices meet in one operation",
        "move the model and the example to one device: model.to('cpu')",
    ),
    Rule(
        "",
        r"not (?:linked|compiled) with (?:support for )?(\w+)|Found no NVIDIA driver",
        "forward moves a tensor to a device that this machine does not have",
        "use the device of the input (x.device) in forward",
    ),
    Rule(
        "RecursionError",
        r"",
        "forward calls itself without an end",
        "give the recursion an end that does not depend on values of tensors",
    ),
    Rule(
        "NotImplementedError",
        r"^$",
        "the model raises NotImplementedError",
        "implement the method, or capture the class that does",
    ),
    Rule(
        "TypeError",
        r"missing (\d+ required (?:positional|keyword-only) arguments?: .+)",
        "forward is missing {0}",
        "pass them in the example, by name: example={{'name': tensor}}",
    ),
    Rule(
        "TypeError",
        r"got an unexpected keyword argument ('\w+')",
        "a function of the model does not know the argument {0}",
        "leave it out of the example, or give it the name that forward knows",
    ),
    Rule(
        "TypeError",
        r"got multiple values for argument ('\w+')",
        "the argument {0} is given twice",
        "give it once, by position or by name",
    ),
    Rule(
        "TypeError",
        r"takes (.+ positional arguments? but .+ given)",
        "a function of the model takes {0}",
        "give the example as forward takes it",
    ),
    Rule(
        "",
        r"doesn't have a fake|TorchScript|torch\.jit|ScriptModule|ScriptFunction|Lambda aren't|"
        r"single top-level function",
        "the model uses TorchScript (torch.jit)",
        "capture the Python module that it was made from",
    ),
    Rule(
        "",
        r"does not require grad|requires_grad|backward|autograd\.grad",
        "forward computes gradients",
        _WHOLE,
    ),
    Rule(
        "",
        r"vmap|functorch",
        "torch.func (vmap, grad) is used",
        "write the batch dimension out: the operations take leading dimensions",
    ),
    Rule(
        "IndexError",
        r"",
        "an index or a dimension is out of range: {error}",
        "check the shapes and the ids of the example",
    ),
    Rule(
        "",
        r"must match the size|same reduction dim|cannot be multiplied|shape .* is invalid|"
        r"size mismatch|not broadcastable|expected .* channels|normalized_shape|expected input|"
        r"Sizes of tensors must match|must match the existing size|invalid for input of size",
        "the shapes of the example do not fit: {error}",
        "check the shapes of the example; they must be what eager forward takes",
    ),
)


def refusal(error: BaseException, name: str, call: Mapping[str, Any]) -> CaptureError:
    """The typed error for what torch.export raised.

    call: the example's arguments by name; they are told where the model rejected them.
    """
    text = str(error)
    frame = _innermost(error.__traceback__)
    place, written = _place(frame)
    what, mend = _rule(error, text)
    first = f"{name} cannot be captured: {what}"
    if place:
        first += f" at {place}"
        if written:
            first += f" (`{written}`)"
    first += f"; {mend}"
    if "shapes of the example" in what or "an index" in what:
        first += f"; it is {_described(call)}"
    return CaptureError(f"{first}\n{type(error).__name__}: {text}" if text else first)


def _rule(error: BaseException, text: str) -> tuple[str, str]:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    for rule in _RULES:
        match = re.search(rule.text, text, re.S)
        if match is None or (rule.kind and rule.kind not in kinds):
            continue
        found = next((group for group in match.groups() if group), "")
        return rule.what.format(found, error=_line(text)), rule.mend.format()
    said = f"{type(error).__name__}: {_line(text)}" if text else type(error).__name__
    return (
        f"forward raises {said}",
        "make forward run on the example in eager mode first; if it does, this line cannot be "
        f"traced with open sizes or without values: change it, or try {_FIXED}",
    )


def _line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:160]


def _innermost(trace: TracebackType | None) -> traceback.FrameSummary | None:
    frames = traceback.extract_tb(trace)
    return next((f for f in reversed(frames) if is_model_file(f.filename)), None)


def _place(frame: traceback.FrameSummary | None) -> tuple[str, str]:
    if frame is None:
        return "", ""
    written = (frame.line or "").strip()
    return f"{os.path.basename(frame.filename)}:{frame.lineno}", _shortened(written)


def _shortened(line: str) -> str:
    return line if len(line) <= 80 else f"{line[:77]}..."


def _described(call: Mapping[str, Any]) -> str:
    parts = []
    for name, value in call.items():
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            parts.append(f"{name} {dtype} {list(value.shape)}")
    return ", ".join(parts)


# What a graph that torch.export did make cannot hold.


def refused_node(node: fx.Node, source: Callable[[fx.Node], str]) -> CaptureError:
    """A call that is no op: torch's higher-order ops and functions of torch.func.

    source: line of the model that made a node.
    """
    name = str(getattr(node.target, "__name__", node.target)).strip("_")
    what, mend = next(
        ((what, mend) for word, (what, mend) in _HIGHER_ORDER.items() if word in name.lower()),
        (f"{name} is not an op graphopt can rewrite", _WHOLE),
    )
    return CaptureError(_told(what, node, source, mend))


def refused_layout(value: Tensor, node: fx.Node, source: Callable[[fx.Node], str]) -> CaptureError:
    """A value that is no dense tensor."""
    layout = str(value.layout).removeprefix("torch.")
    return CaptureError(
        _told(f"a tensor of layout {layout} is made", node, source, "use dense tensors (.to_dense)")
    )


def refused_dtype(value: Tensor, node: fx.Node, source: Callable[[fx.Node], str]) -> CaptureError:
    """A value of a dtype that no graph has."""
    is_input = node.op == "placeholder"
    what = f"input {node.name!r} is {value.dtype}" if is_input else f"{value.dtype} is made"
    return CaptureError(_told(what, node, source, f"convert it: graphs have {told_dtypes()}"))


def refused_change(
    kind: str, target: str, node: fx.Node | None, source: Callable[[fx.Node], str]
) -> CaptureError:
    """A forward that writes to a buffer, a parameter or an input.

    kind: of torch's output (buffer_mutation, user_input_mutation). node: the value written.
    """
    if "input" in kind:
        what = f"the model changes its input {target!r} in place"
        mend = "write x = x + y in place of x += y, or clone the input first"
    else:
        what = f"the model changes its state ({kind} of {target})"
        mend = "pass use_cache=False, or remove the mutation"
    return CaptureError(_told(what, node, source, f"{_PURE}: {mend}"))


_HIGHER_ORDER: dict[str, tuple[str, str]] = {
    "wrap_with_autocast": (
        "a part of the model runs under torch.autocast, which computes it in another dtype",
        "convert the tensors with .to(dtype) instead, or turn autocast off there (enabled=False), "
        "which is captured",
    ),
    "wrap_with_set_grad_enabled": (
        "a part of the model turns gradients on or off in a way torch.export nests",
        "remove torch.enable_grad or set_grad_enabled from forward",
    ),
    "while_loop": (
        "torch's while_loop runs a part of the model a number of times that data decide",
        "write a Python loop of a fixed length",
    ),
    "cond": (
        "torch.cond chooses a part of the model by the values of a tensor",
        "compute both ways and choose with torch.where",
    ),
    "flex_attention": (
        "flex_attention computes scores by a function of the model",
        "use scaled_dot_product_attention with a mask or a bias",
    ),
    "batch_dim": (
        "torch.func.vmap maps a function over a dimension",
        "write the batch dimension out: the operations take leading dimensions",
    ),
    "lazy_load_decompositions": (
        "torch.func.vmap maps a function over a dimension",
        "write the batch dimension out: the operations take leading dimensions",
    ),
    "vmap": (
        "torch.func.vmap maps a function over a dimension",
        "write the batch dimension out: the operations take leading dimensions",
    ),
    "scan": ("torch's scan runs a part of the model for each element", "write a Python loop"),
    "checkpoint": ("a part of the model is checkpointed", "turn checkpointing off for inference"),
    "autograd": (
        "a torch.autograd.Function of the model is nested",
        "call the operations of its forward directly",
    ),
    "triton": ("the model calls a Triton kernel", "use the ordinary operations on this device"),
}


def _told(what: str, node: fx.Node | None, source: Callable[[fx.Node], str], mend: str) -> str:
    place = source(node) if node is not None else ""
    return f"{what}{f' at {place}' if place else ''}; {mend}"
