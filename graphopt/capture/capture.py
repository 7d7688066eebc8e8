"""`graphopt.capture`: a model, or an ExportedProgram, becomes one `Graph` with provenance."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from transformers import PreTrainedModel

from graphopt.capture.arguments import Example, bind, in_order, parameters_of
from graphopt.capture.bounds import limits_of, limits_of_exported
from graphopt.capture.capturable import check_capturable, check_weights
from graphopt.capture.export import graph_from_exported
from graphopt.capture.hf import attention_hooks
from graphopt.capture.hf_probe import difference_found
from graphopt.capture.mask_marker import take_out
from graphopt.capture.size_decisions import Decisions
from graphopt.capture.size_one import sizes_kept_from_one
from graphopt.capture.snapshot import Change
from graphopt.capture.source import ModelSource
from graphopt.capture.torch_export import export_module
from graphopt.capture.torch_layers import torch_layers_as_written
from graphopt.capture.untouched import check_forgets, each_run_untouched, untouched
from graphopt.errors import CaptureError
from graphopt.ir.graph import Graph
from graphopt.ir.opset import load_all

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
        A size that the model bounds is captured with its bound, see `Graph.limits`.
    strict: capture with TorchDynamo instead of plain Python tracing.
    example, dynamic and strict are refused for an ExportedProgram, which has settled them.

    The inputs of the result are the tensors of the example in the order of forward's signature.
    Every node of the result has `val`, `layer`, `source` and `history`.
    Raises CaptureError with torch's own reason when the model cannot be captured whole.
    """
    load_all()
    if isinstance(model, ExportedProgram):
        _refuse_options(example, dynamic, strict)
        graph = graph_from_exported(model, type(model).__name__)
        graph.symbols.update(_symbol_names(graph))
        graph.limits = limits_of_exported(model, graph.symbols)
        return graph
    if isinstance(model, Graph):
        raise CaptureError("the model is a Graph: it is captured already")
    source = model if isinstance(model, ModelSource) else ModelSource(model, type(model).__name__)
    module = source.module
    if not isinstance(module, nn.Module):
        raise CaptureError(
            f"cannot capture a {type(module).__name__}; give an nn.Module, an ExportedProgram "
            "or what graphopt.models.load returned"
        )
    check_capturable(module, isinstance(example, (Tensor, Sequence)))
    check_weights(module, source.packed)
    call, positional = bind(module, example)
    # torch.export takes one tensor given twice for one input.
    call = {n: v.clone() if isinstance(v, Tensor) else v for n, v in call.items()}
    tensors = {name: value for name, value in call.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CaptureError("the example holds no tensor")
    if isinstance(module, PreTrainedModel) and "use_cache" in parameters_of(module):
        call.setdefault("use_cache", False)
    axes = _axes(tensors, dynamic)
    call = in_order(module, call)
    try:
        with untouched(module), _materialised(module), torch_layers_as_written(), torch.no_grad():
            graph = _graph(module, call, axes, strict, source.name, positional)
    except SystemExit as error:
        raise CaptureError(
            f"forward of {source.name} ends the process (SystemExit: {error.code!r}); take "
            "sys.exit out of what it calls"
        ) from error
    for name in list(graph.weights):
        if name in source.packed:
            graph.packed[name] = source.packed[name]
            graph.weights[name] = graph.weights[name].to("meta")
    return graph


def _graph(
    module: nn.Module,
    call: Mapping[str, Any],
    axes: Mapping[str, Mapping[int, str]],
    strict: bool,
    name: str,
    positional: Sequence[str],
) -> Graph:
    """Export; a transformers model with graphopt as its attention, unless that cannot be said or
    something reads what graphopt put in: then as it is, with a note."""
    export = _Export(module, strict, name, positional)
    if not isinstance(module, PreTrainedModel) or strict:
        return export.limited(call, axes)
    try:
        with attention_hooks(module, isinstance(call.get("position_ids"), Tensor)) as layers:
            graph = export.limited(call, axes)
        reason = take_out(graph) or difference_found(layers.calls)
    except CaptureError as error:
        reason = str(error)
    if reason is None:
        return graph
    graph = export.limited(call, axes)
    first_line = reason.partition("\n")[0]
    graph.notes = (*graph.notes, f"attention is captured as the model computes it: {first_line}")
    return graph


@dataclass(frozen=True, slots=True, eq=False)
class _Export:
    """How one module is exported."""

    module: nn.Module
    strict: bool
    name: str
    positional: Sequence[str]

    def limited(self, call: Mapping[str, Any], axes: Mapping[str, Mapping[int, str]]) -> Graph:
        """The graph, with the conditions on its sizes."""
        graph, decisions = self._run(call, axes)
        limits = limits_of(decisions, graph.symbols)
        kept = sizes_kept_from_one(
            graph, decisions, limits, call, axes, lambda *smaller: self._run(*smaller)[0]
        )
        graph.limits = (*limits, *kept)
        return graph

    def _run(
        self, call: Mapping[str, Any], axes: Mapping[str, Mapping[int, str]]
    ) -> tuple[Graph, Decisions]:
        changes: list[Change] = []
        # TorchDynamo keeps the state apart itself, and would trace the keeping.
        with contextlib.nullcontext() if self.strict else each_run_untouched(self.module, changes):
            program, decisions = export_module(
                self.module, call, axes, self.strict, self.name, self.positional
            )
        graph = graph_from_exported(program, self.name)
        check_forgets(self.module, call, changes)
        graph.symbols.update(_symbol_names(graph, axes))
        return graph, decisions


def _refuse_options(example: Example | None, dynamic: Dynamic | bool, strict: bool) -> None:
    """What an ExportedProgram has settled."""
    if example is not None:
        raise CaptureError("an ExportedProgram carries its own example; do not pass one")
    for option, is_given in (("dynamic", dynamic is not True), ("strict", strict)):
        if is_given:
            raise CaptureError(
                f"{option}= has no effect on a program that is already exported; "
                f"leave it out, or give {option}= for the nn.Module itself"
            )


def _axes(tensors: Mapping[str, Tensor], dynamic: Dynamic | bool) -> dict[str, dict[int, str]]:
    if dynamic is False:
        return {}
    if dynamic is not True:
        return _named_axes(tensors, dynamic)
    axes: dict[str, dict[int, str]] = {}
    for name, tensor in tensors.items():
        axes[name] = {0: "batch"} if tensor.ndim else {}
        if tensor.ndim > 1 and not tensor.is_floating_point():
            axes[name][1] = "sequence"
    return axes


def _named_axes(tensors: Mapping[str, Tensor], dynamic: Any) -> dict[str, dict[int, str]]:
    """The axes of `dynamic`, each of them an axis of a tensor, with a name that can be printed."""
    shape = "dynamic must be True, False or like {'input_ids': {0: 'batch', 1: 'sequence'}}"
    if not isinstance(dynamic, Mapping):
        raise CaptureError(f"{shape}, not {dynamic!r}")
    for name, axes in dynamic.items():
        if name not in tensors:
            raise CaptureError(f"dynamic names {name!r}, which is no tensor of the example")
        if not isinstance(axes, Mapping):
            raise CaptureError(f"{shape}; {name!r} has {axes!r}")
        for axis, dim in axes.items():
            if not isinstance(axis, int) or not 0 <= axis < tensors[name].ndim:
                raise CaptureError(
                    f"dynamic names axis {axis!r} of {name!r}, which has axes 0 to "
                    f"{tensors[name].ndim - 1}"
                )
            if not isinstance(dim, str) or not dim.isidentifier():
                raise CaptureError(
                    f"dynamic calls axis {axis} of {name!r} {dim!r}; a name is letters, digits and "
                    "_, such as 'batch'"
                )
    return {name: dict(axes) for name, axes in dynamic.items()}


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


@contextlib.contextmanager
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
