"""torch.export -> Graph: weights lifted out by name, provenance read off, symbols named.

The ExportedProgram is functionalised (`run_decompositions({})`) only when an op in it writes to
its argument, so SDPA, linear and friends stay whole.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from graphopt.capture.outputs import outputs_of
from graphopt.capture.refusals import (
    refused_change,
    refused_dtype,
    refused_layout,
    refused_node,
)
from graphopt.capture.size_decisions import is_model_file
from graphopt.errors import CaptureError
from graphopt.ir.clean import remove_dead
from graphopt.ir.graph import Graph, InputSpec, graph_module, tensor_inputs, value_name, where
from graphopt.ir.opset import is_impure
from graphopt.ir.plain_tensor import why_not_plain
from graphopt.ir.shapes import DTYPE_NAMES, told_dtypes

_WRITTEN = re.compile(r"Constant (\S+) is mutated in the forward method")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_WEIGHT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def layer_of(node: fx.Node) -> str:
    """Module path of the innermost module that was running, "" at the top."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _class = list(stack.values())[-1]
    path = str(path).removeprefix("L['self'].").removeprefix("L__self__.")
    return "" if path.startswith("_empty_nn_module_stack") else path.partition("@")[0]


def source_of(node: fx.Node) -> str:
    """`modeling_llama.py:164` of the innermost model frame; torch's own frames are skipped."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    for path, line in reversed(frames):
        if is_model_file(path):
            return f"{os.path.basename(path)}:{line}"
    return ""


def is_random(node: fx.Node) -> bool:
    """Whether a call's values differ from run to run. Dropout that is off is none."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    arguments = tensor_inputs(node)
    for spec in node.target._schema.arguments:
        value = arguments.get(spec.name, spec.default_value)
        if spec.name in ("train", "training", "p", "dropout_p", "dropout") and not value:
            return False
    return True


def functional(program: ExportedProgram) -> ExportedProgram:
    """The program without in-place ops and nested graphs; untouched when there are none."""
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    is_nested = any(n.op == "get_attr" for n in program.graph.nodes)
    if is_nested or any(is_impure(n.target) for n in calls):
        try:
            functionalised: ExportedProgram = program.run_decompositions({})
        except RuntimeError as error:
            constant = _WRITTEN.search(str(error))
            if constant is None:
                raise
            raise CaptureError(
                f"the model changes its state: forward writes into {constant[1]}, a tensor that is "
                "no buffer; take it as an argument and return it"
            ) from error
        return functionalised
    return program


def graph_from_exported(
    program: ExportedProgram, name: str, symbol_names: Mapping[str, str] | None = None
) -> Graph:
    """Turn an ExportedProgram into a `Graph`.

    symbol_names: expression of a symbolic size -> readable name.
    Raises CaptureError for mutated state or inputs, higher-order ops, weights of other types than
    plain tensors, and outputs that are neither tensors nor None.
    """
    nested = [n for n in program.graph.nodes if any(a.op == "get_attr" for a in n.all_input_nodes)]

    def place_of(node: fx.Node) -> str:
        """Line of a node; a nested graph loses it when the program is made functional."""
        first = (source_of(n) for n in nested if n.target is node.target)
        return source_of(node) or next(first, "")

    program = functional(program)
    signature = program.graph_signature
    for spec in signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            written = next((n for n in program.graph.nodes if n.name == spec.arg.name), None)
            raise refused_change(spec.kind.name.lower(), str(spec.target), written, source_of)
    weights: dict[str, Tensor] = {}
    lifted: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for input_spec in signature.input_specs:
        if input_spec.kind in _WEIGHT_KINDS:
            target = str(input_spec.target)
            data = (
                program.state_dict[target]
                if target in program.state_dict
                else program.constants[target]
            )
            _check_weight(target, data)
            # Tied weights become one weight, under the first name.
            shared = first_name.setdefault(id(data), target)
            weights.setdefault(shared, data.detach())
            lifted[input_spec.arg.name] = shared
        elif input_spec.kind is not InputKind.USER_INPUT:
            raise CaptureError(
                f"forward uses {input_spec.target or input_spec.arg.name}, an object that no graph "
                f"can hold ({input_spec.kind.name}), such as a torch.Generator; draw or compute "
                "what it gives outside, and pass that to forward"
            )

    new = fx.Graph()
    notes: tuple[str, ...] = ()
    mapping: dict[fx.Node, Any] = {}
    weight_nodes: dict[str, fx.Node] = {}
    inputs: list[InputSpec] = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in lifted:
                if lifted[node.name] in weight_nodes:
                    mapping[node] = weight_nodes[lifted[node.name]]
                    continue
                made = new.create_node("get_attr", lifted[node.name])
                weight_nodes[lifted[node.name]] = made
            elif isinstance(node.meta.get("val"), Tensor):
                made = new.placeholder(node.name)
                inputs.append(InputSpec(node.name))
            else:
                # A Python constant (use_cache=False): its value was burnt into the graph.
                continue
        elif node.op == "output":
            outputs, notes = outputs_of(program, mapping)
            made = new.output(outputs)
        elif node.op == "call_function":
            module = str(getattr(node.target, "__module__", ""))
            is_op = isinstance(node.target, torch._ops.OpOverload)
            if not is_op and module not in ("_operator", "operator", "math", "torch"):
                raise refused_node(node, place_of)
            made = new.node_copy(node, mapping.__getitem__)
        else:
            # A nested graph; the call that runs it says what it is.
            raise refused_node(next(iter(node.users), node), place_of)
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor) and value.layout != torch.strided:
                raise refused_layout(value, node, source_of)
            if isinstance(value, Tensor) and value.dtype not in DTYPE_NAMES:
                raise refused_dtype(value, node, source_of)
        made.meta = {
            "val": node.meta.get("val"),
            "layer": layer_of(node),
            "source": source_of(node),
        }
        mapping[node] = made
    graph = Graph(
        name,
        graph_module(new),
        tuple(inputs),
        weights,
        symbols=dict(symbol_names or {}),
        notes=notes,
    )
    remove_dead(graph)
    _number(graph)
    drawn = dict.fromkeys(f"{node.target} ({node.meta['source']})" for node in random_calls(graph))
    if drawn:
        graph.notes += (
            f"the model draws random numbers, so that no two runs are equal: {', '.join(drawn)}",
        )
    return graph


def random_calls(graph: Graph) -> list[fx.Node]:
    """Calls whose values differ from run to run."""
    return [node for node in graph.nodes if node.op == "call_function" and is_random(node)]


def refuse_random(graph: Graph) -> None:
    """Raise CaptureError naming the first call that draws random numbers.

    A graph may have such calls, to be looked at and bisected; a program would answer each call with
    something else, and nobody could say whether that is right.
    """
    for node in random_calls(graph):
        raise CaptureError(
            f"{graph.name} draws random numbers: {where(node)}; call model.eval(), give F.dropout "
            "training=self.training, or draw them outside and pass them to forward"
        )


def _check_weight(name: str, data: Any) -> None:
    """Raise CaptureError for a weight without values, that is no plain tensor, or of a dtype that
    no graph has."""
    reason = why_not_plain(data) if isinstance(data, Tensor) else f"is a {type(data).__name__}"
    if reason is not None:
        raise CaptureError(
            f"weight {name!r} {reason}; quantized weights can be loaded from a GGUF file"
        )
    if data.dtype not in DTYPE_NAMES:
        raise CaptureError(
            f"weight {name!r} is {data.dtype}; convert it: graphs have {told_dtypes()}"
        )


def _number(graph: Graph) -> None:
    """Every value of a captured graph comes from itself: later ones name these."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.meta["number"] = graph.take_number()
        node.meta["history"] = frozenset([value_name(node)])
