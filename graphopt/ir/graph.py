"""The IR: one FX GraphModule plus what FX lacks.

Every node carries in `node.meta`
    val      FakeTensor / SymInt: shape and dtype, symbolic axes included
    layer    module path in the model ("model.layers.0.self_attn"), "" where there is none
    source   "file.py:123", the line of the model that made it, "" where there is none
    history  frozenset of names: the captured nodes it comes from ("%12", "@norm.weight") and the
             rule sites that made it ("fuse_norm#3")
    number   calls only: given when the node is made and never used again in this graph or a copy
             of it, so that a value has one name ("%12") in the text after every pass

Weights are `get_attr` nodes whose target is the dotted parameter name; their data live in
`Graph.weights` and may be on the meta device when a low-bit weight stands for them
(`Graph.packed`). Nodes are created by `GraphBuilder.emit` only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from graphopt.ir.assumptions import Assumption
from graphopt.ir.limits import Limit
from graphopt.ir.text.names import weight_text
from graphopt.ir.weights import PackedWeight

InputKind = Literal["user", "cache"]


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One graph input: a value the caller passes, or KV-cache storage that the graph writes."""

    name: str
    kind: InputKind = "user"


@dataclass(eq=False)
class Graph:
    """A captured or rewritten model.

    name: for messages and file names.
    gm: the FX graph; placeholders are exactly `inputs`, in order.
    weights: dotted name -> tensor (meta device when the data are in `packed`).
    packed: parameter name -> low-bit weight that replaces it.
    symbols: expression text of a symbolic size -> its readable name ("s72" -> "batch").
    dialect: "captured" (ATen and graphopt ops) or "serving" (token rows, paged KV cache).
    """

    name: str
    gm: fx.GraphModule
    inputs: tuple[InputSpec, ...]
    weights: dict[str, Tensor]
    packed: dict[str, PackedWeight] = field(default_factory=dict)
    symbols: dict[str, str] = field(default_factory=dict)
    dialect: Literal["captured", "serving"] = "captured"
    inferred: dict[Any, Any] = field(default_factory=dict, repr=False)
    """Shape inference already done, by op and operand types; shared by copies."""
    records: tuple[Any, ...] = field(default=(), repr=False)
    """What was done to this graph, in order, by whoever did it (`graphopt.record`): nothing here
    reads it; copies keep it, the textual form does not."""
    next_number: int = 0
    """`number` of the next call."""
    limits: tuple[Limit, ...] = ()
    """Conditions on the symbolic sizes under which the graph is the model."""
    notes: tuple[str, ...] = ()
    """What capture has to say about it: outputs that are None, attention taken as the model
    computes it. Copies keep it, the textual form does not."""
    assumptions: tuple[Assumption, ...] = ()
    """What rewrites took for granted of inputs, each once; see `graphopt.ir.assumptions`."""

    @property
    def fx_graph(self) -> fx.Graph:
        """The FX graph itself."""
        return self.gm.graph

    @property
    def nodes(self) -> Iterator[fx.Node]:
        """All nodes in execution order."""
        return iter(self.gm.graph.nodes)

    def calls(self, target: object) -> list[fx.Node]:
        """Every call_function node of one op overload."""
        return [n for n in self.nodes if n.op == "call_function" and n.target is target]

    @property
    def output_nodes(self) -> tuple[fx.Node, ...]:
        """The nodes returned, in order."""
        (values,) = self.gm.graph.output_node().args
        assert isinstance(values, (tuple, list))
        return tuple(value for value in values if isinstance(value, fx.Node))

    def op_counts(self) -> Counter[str]:
        """How often each op is called."""
        return Counter(op_name(n) for n in self.nodes if n.op == "call_function")

    def num_calls(self) -> int:
        """Number of call_function nodes."""
        return sum(1 for n in self.nodes if n.op == "call_function")

    def copy(self) -> Graph:
        """An independent graph over the same weight data."""
        new_fx = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            copied[node] = new_fx.node_copy(node, copied.__getitem__)
        return Graph(
            self.name,
            graph_module(new_fx),
            self.inputs,
            dict(self.weights),
            dict(self.packed),
            dict(self.symbols),
            self.dialect,
            self.inferred,
            self.records,
            self.next_number,
            self.limits,
            self.notes,
            self.assumptions,
        )

    def assume(self, assumption: Assumption) -> None:
        """Add an assumption, unless an earlier rewrite has made it."""
        if (assumption.code, assumption.subject) not in {
            (known.code, known.subject) for known in self.assumptions
        }:
            self.assumptions += (assumption,)

    def take_number(self) -> int:
        """A number that no call has, or had."""
        self.next_number += 1
        return self.next_number - 1

    def prune_weights(self) -> None:
        """Forget the weights that no node reads any more."""
        used = {str(n.target) for n in self.nodes if n.op == "get_attr"}
        for name in [name for name in self.weights if name not in used]:
            del self.weights[name]
        for name in [name for name in self.packed if name not in used]:
            del self.packed[name]


def graph_module(fx_graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule that holds `fx_graph`, and has no code: weights are looked up in
    `Graph.weights`, not as attributes, and their names need not be Python's."""
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    module._graph = fx_graph
    fx_graph.owning_module = module
    return module


def op_name(node: fx.Node) -> str:
    """`aten.linear`, `graphopt.attention`, `sym.mul`: short and free of torch-version noise."""
    if node.op != "call_function":
        return node.op
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        overload = target._schema.overload_name
        return f"{namespace}.{name}" + (f".{overload}" if overload else "")
    return f"sym.{getattr(target, '__name__', str(target))}"


def is_call(value: object, *targets: object) -> bool:
    """True when `value` is a call_function node of one of `targets`."""
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target in targets


def shape_of(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """Shape of a tensor node."""
    return tuple(node.meta["val"].shape)


def axis_of(dim: Any, rank: int) -> int:
    """Axis `dim` counted from the first; torch takes 0 and -1 for the axis of what has none."""
    return int(dim) % rank if rank else 0


def dtype_of(node: fx.Node) -> torch.dtype:
    """Dtype of a tensor node."""
    dtype = node.meta["val"].dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def namespaces_of(graph: Graph) -> set[str]:
    """Namespaces of the torch ops that a graph calls."""
    targets = (node.target for node in graph.nodes if node.op == "call_function")
    return {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}


def value_name(node: fx.Node) -> str:
    """`%12`, `%input_ids`, `@norm.weight`: the name that a value has in the graph text."""
    if node.op == "call_function" and "number" in node.meta:
        return f"%{node.meta['number']}"
    target = str(node.target)
    return f"@{weight_text(target)}" if node.op == "get_attr" else f"%{target}"


def where(node: fx.Node) -> str:
    """`aten.conv1d (%12) at modeling_x.py:12 in model.layers.0.conv`, for messages."""
    text = f"{op_name(node)} ({value_name(node)})"
    if node.meta.get("source"):
        text += f" at {node.meta['source']}"
    if node.meta.get("layer"):
        text += f" in {node.meta['layer']}"
    return text


def argument(node: fx.Node, name: str) -> Any:
    """The value of one schema argument of a call, by name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for index, spec in enumerate(node.target._schema.arguments):
        if spec.name == name:
            if not spec.kwarg_only and index < len(node.args):
                return node.args[index]
            return node.kwargs.get(name, spec.default_value)
    raise KeyError(f"{node.target} has no argument {name!r}")


def tensor_inputs(node: fx.Node) -> Mapping[str, Any]:
    """Schema argument name -> value for a call, positional and keyword alike."""
    assert isinstance(node.target, torch._ops.OpOverload)
    bound: dict[str, Any] = {}
    for index, spec in enumerate(node.target._schema.arguments):
        if not spec.kwarg_only and index < len(node.args):
            bound[spec.name] = node.args[index]
        elif spec.name in node.kwargs:
            bound[spec.name] = node.kwargs[spec.name]
    return bound
