"""`graphopt.capture`: a model, or an ExportedProgram, becomes one `Graph` with provenance."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from graphopt.capture.export import graph_from_exported
from graphopt.capture.hf import attention_hooks
from graphopt.capture.source import ModelSource
from graphopt.errors import CaptureError
from graphopt.ir.graph import Graph
from graphopt.ops.registry import load_all

Example = Tensor | Sequence[Any] | Mapping[str, Any]
Dynamic = Mapping[str, Mapping[int, str]]


def capture(
    model: nn.Module | ExportedProgram | ModelSource,
    example: Example | None = None,
    *,
    dynamic: Dynamic | bool = True,
    strict: bool = False,
) -> Graph:
    """Capture `model` as a graph of ATen and graphopt ops.

    example: what to call the model with: one tensor, positional arguments, or keyword arguments.
        Defaults to int64 token ids `[2, 16]` for models whose first argument is `input_ids`.
    dynamic: True: axis 0 of every tensor is "batch", axis 1 of every integer or bool tensor is
        "sequence". False: all sizes are fixed. Or explicit: {"input_ids": {0: "batch"}}.
    strict: capture with TorchDynamo instead of plain Python tracing.

    Every node of the result has `val`, `layer`, `source` and `history`.
    Raises CaptureError with torch's own reason when the model cannot be captured whole.
    """
    load_all()
    if isinstance(model, ExportedProgram):
        if example is not None:
            raise CaptureError("an ExportedProgram carries its own example; do not pass one")
        graph = graph_from_exported(model, type(model).__name__)
        graph.symbols.update(_symbol_names(graph))
        return graph
    source = model if isinstance(model, ModelSource) else ModelSource(model, type(model).__name__)
    module = source.module
    if not isinstance(module, nn.Module):
        raise CaptureError(
            f"cannot capture a {type(module).__name__}; give an nn.Module, an ExportedProgram "
            "or what graphopt.models.load returned"
        )
    if module.training:
        raise CaptureError("the model is in training mode; call model.eval() first")
    kwargs = _bind(module, example)
    # torch.export takes one tensor given twice for one input.
    kwargs = {n: v.clone() if isinstance(v, Tensor) else v for n, v in kwargs.items()}
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CaptureError("the example holds no tensor")
    axes = _axes(tensors, dynamic)
    dims = {name: Dim(name) for per_input in axes.values() for name in per_input.values()}
    shapes = {
        name: {axis: dims[dim] for axis, dim in axes[name].items()} if name in axes else None
        for name in kwargs
    }
    packed_shared = _materialised(module)
    with (
        packed_shared,
        torch.no_grad(),
        attention_hooks(module, "position_ids" in tensors) as is_hf,
    ):
        call = dict(kwargs)
        if is_hf and "use_cache" in _parameters(module):
            call.setdefault("use_cache", False)
            shapes.setdefault("use_cache", None)
        program = _export(module, call, shapes, strict, source.name)
        graph = graph_from_exported(program, source.name)
    graph.symbols.update(_symbol_names(graph, axes))
    for name in list(graph.weights):
        if name in source.packed:
            graph.packed[name] = source.packed[name]
            graph.weights[name] = graph.weights[name].to("meta")
    return graph


def _export(
    module: nn.Module, call: dict[str, Any], shapes: dict[str, Any], strict: bool, name: str
) -> ExportedProgram:
    """torch.export; a size the model bounds (learned positions) is bounded and tried once more."""
    for attempt in range(2):
        try:
            return torch.export.export(module, (), call, dynamic_shapes=shapes, strict=strict)
        except CaptureError:
            raise
        except Exception as error:
            refined = _bounded(str(error), shapes) if attempt == 0 else None
            if refined is None:
                raise CaptureError(f"torch.export could not capture {name}: {error}") from error
            shapes = refined
    raise AssertionError("unreachable")


def _bounded(message: str, shapes: dict[str, Any]) -> dict[str, Any] | None:
    """Dynamic shapes with the upper bounds that torch.export suggests; None when it suggests
    anything else, such as fixing a size."""
    limits = {
        match["name"]: int(match["max"])
        for match in re.finditer(r"(?P<name>\w+) = Dim\('\w+', max=(?P<max>\d+)\)", message)
    }
    suggested = set(re.findall(r"^\s*(\w+) = ", message.partition("Suggested fixes:")[2], re.M))
    if not limits or suggested != set(limits):
        return None
    dims = {name: Dim(name, max=limit) for name, limit in limits.items()}
    return {
        name: axes and {axis: dims.get(dim.__name__, dim) for axis, dim in axes.items()}
        for name, axes in shapes.items()
    }


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(module.forward).parameters


def _bind(module: nn.Module, example: Example | None) -> dict[str, Any]:
    parameters = _parameters(module)
    names = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if example is None:
        if not names or names[0] != "input_ids":
            raise CaptureError(
                f"no example given, and the first argument of {type(module).__name__}.forward is "
                f"{names[0] if names else 'missing'!r}, not 'input_ids'"
            )
        return {"input_ids": torch.ones((2, 16), dtype=torch.int64)}
    if isinstance(example, Tensor):
        example = (example,)
    if isinstance(example, Mapping):
        unknown = [name for name in example if name not in parameters]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if unknown and not takes_any:
            raise CaptureError(f"forward has no argument {unknown[0]!r}; it has {names}")
        return dict(example)
    if len(example) > len(names):
        raise CaptureError(f"{len(example)} example arguments for forward({', '.join(names)})")
    return dict(zip(names, example, strict=False))


def _axes(tensors: Mapping[str, Tensor], dynamic: Dynamic | bool) -> dict[str, dict[int, str]]:
    if dynamic is False:
        return {}
    if dynamic is not True:
        unknown = [name for name in dynamic if name not in tensors]
        if unknown:
            raise CaptureError(f"dynamic names {unknown[0]!r}, which is no tensor of the example")
        return {name: dict(axes) for name, axes in dynamic.items()}
    axes: dict[str, dict[int, str]] = {}
    for name, tensor in tensors.items():
        axes[name] = {0: "batch"} if tensor.ndim else {}
        if tensor.ndim > 1 and not tensor.is_floating_point():
            axes[name][1] = "sequence"
        for axis, dim in axes[name].items():
            if tensor.shape[axis] < 2:
                raise CaptureError(
                    f"axis {axis} ({dim}) of example input {name!r} has size "
                    f"{tensor.shape[axis]}; a dynamic axis needs at least 2 in the example"
                )
    return axes


def _symbol_names(
    graph: Graph, axes: Mapping[str, Mapping[int, str]] | None = None
) -> dict[str, str]:
    """Expression of each symbolic size of an input -> "batch", "sequence", or its position."""
    names: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt):
                default = ("batch", "sequence")[axis] if axis < 2 else f"{node.name}_{axis}"
                chosen = (axes or {}).get(node.name, {}).get(axis, default)
                if str(size) not in names:
                    taken = chosen in names.values()
                    names[str(size)] = f"{node.name}_{axis}" if taken else chosen
    return names


@contextmanager
def _materialised(module: nn.Module) -> Iterator[None]:
    """Give meta parameters an address for the time of the export.

    torch.empty is not touched by tracing, so no memory is used; the parameters are put back on
    the meta device afterwards, where eager use fails loudly.
    """
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    stand_in: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                if id(parameter) not in stand_in:
                    empty = torch.empty_like(parameter, device="cpu")
                    stand_in[id(parameter)] = nn.Parameter(empty, requires_grad=False)
                replaced.append((owner, name, parameter))
                owner._parameters[name] = stand_in[id(parameter)]
    try:
        yield
    finally:
        for owner, name, parameter in replaced:
            owner._parameters[name] = parameter
