"""What a model returns, as the outputs of a graph.

A graph returns tensors, in the order in which they lie in what forward returned (tuples, dicts,
transformers' ModelOutput, dataclasses). Anything else in there is named: None is left
out with a note, all others are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphopt.errors import CaptureError

_VALUES = (
    *(Tensor, str, bytes, int, float, complex, type(None), torch.dtype, torch.device),
    *(torch.SymInt, torch.SymFloat, torch.SymBool),
)


def outputs_of(
    program: ExportedProgram, mapping: Mapping[fx.Node, fx.Node]
) -> tuple[tuple[fx.Node, ...], tuple[str, ...]]:
    """The nodes that stand for the outputs of `program`, and notes on those that have none.

    Raises CaptureError naming the first that is neither a tensor nor None.
    """
    (values,) = program.graph.output_node().args
    assert isinstance(values, (tuple, list))
    names = _names(program, len(values))
    outputs: list[fx.Node] = []
    nothing: list[str] = []
    for name, value in zip(names, values, strict=True):
        if value is None:
            nothing.append(name)
        elif isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor):
            outputs.append(mapping[value])
        else:
            raise CaptureError(_refusal(name, value))
    if not outputs:
        raise CaptureError("the model returns no tensor; return what the graph shall compute")
    notes = (f"the model returns None as {', '.join(nothing)}; it is no output",) if nothing else ()
    return tuple(outputs), notes


def plain(output: Any, path: str = "") -> Any:
    """What forward returned, with dataclasses that torch does not know as dicts of their fields.

    Raises CaptureError naming an object in it that is neither a container nor a value.
    """
    kind = type(output)
    if dataclasses.is_dataclass(output) and kind not in pytree.SUPPORTED_NODES:
        names = [item.name for item in dataclasses.fields(output)]
        output = {name: getattr(output, name) for name in names}
        kind = dict
    if kind is dict:
        return {key: plain(value, f"{path}.{key}") for key, value in output.items()}
    if kind in (list, tuple):
        return kind(plain(value, f"{path}[{index}]") for index, value in enumerate(output))
    is_known = kind in pytree.SUPPORTED_NODES or hasattr(output, "_fields")
    if not is_known and not isinstance(output, _VALUES):
        raise CaptureError(_refusal(path.lstrip(".") or "its output", output))
    return output


def _refusal(name: str, value: Any) -> str:
    # The text of any other object may be long, or an address.
    has_text = isinstance(value, (str, bytes, int, float, complex))
    what = f"{type(value).__name__} {value!r}" if has_text else f"an object {type(value).__name__}"
    if isinstance(value, fx.Node):
        what = f"a size ({value.meta.get('val')})"
    return (
        f"the model returns {what} as {name}; only tensors can be graph outputs: leave it out of "
        "what forward returns, or return a tensor that holds it"
    )


def _names(program: ExportedProgram, count: int) -> list[str]:
    """ "logits", "hidden_states[0]", for each leaf of what forward returned."""
    names = _leaves("", program.call_spec.out_spec) if program.call_spec.out_spec else []
    return names if len(names) == count else [f"output {index}" for index in range(count)]


def _leaves(path: str, spec: pytree.TreeSpec) -> list[str]:
    if spec.is_leaf():
        return [path or "its output"]
    children = spec.children()
    keys = _keys(spec.type, spec.context, len(children))
    found: list[str] = []
    for key, child in zip(keys, children, strict=True):
        step = f"[{key}]" if isinstance(key, int) else f".{key}" if path else str(key)
        found += _leaves(path + step if path or isinstance(key, str) else f"output {key}", child)
    return found


def _keys(kind: Any, context: Any, count: int) -> list[Any]:
    """Names of a node's children, where its kind has any; else positions."""
    if hasattr(kind, "_fields"):
        context = list(kind._fields)
    elif isinstance(context, (list, tuple)) and context and isinstance(context[0], (list, tuple)):
        # A dataclass: the fields that are flattened, then those that are None.
        context = context[0]
    is_names = isinstance(context, (list, tuple)) and all(isinstance(k, str) for k in context)
    return list(context) if is_names and len(context) == count else list(range(count))
