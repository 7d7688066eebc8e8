"""The textual form of a graph, `.gir`: one typed line a node, its provenance as a comment.

    gir 1
    graph "tiny" captured
    limit sequence <= 24 branch  # model.py:12
    input %input_ids : i64[batch, sequence] user
    input %mask : i64[batch, sequence] user
    assume zeros-and-ones %mask  # layers.0 | model.py:7 | fuse_attention#0
    weight @embed.weight : f32[100, 64]
    %0 : size[sequence] = aten.sym_size.int(%input_ids, 1)  #  | model.py:3
    %1 : f32[batch, sequence, 64] = aten.embedding(@embed.weight, %input_ids)  # embed | ...
    return %1

A value keeps its number through all passes (a removed value takes its line with it, and no other
line changes), inputs and weights keep their names. The comment is `layer | source | history`;
history names the captured values that this one comes from, as 00_capture.gir numbers them, and the
rewrites that made it; it is left out where it is the value itself. An `assume` line says what a
rewrite takes for granted of an input (`assumptions.py`). Weights that differ only in the
number of their layer share a line (`@layers.{0-29}.norm.weight`). Nothing depends on FX node names
or on the torch version. `parser.py` reads it back.

The canonical form numbers the values in order and has only the layer in its comments: equal for
graphs of equal structure, wherever they come from.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graphopt.errors import VerifyError
from graphopt.ir.assumptions import Assumption
from graphopt.ir.graph import Graph, op_name, value_name
from graphopt.ir.shapes import DTYPE_NAMES
from graphopt.ir.text.history import write_history
from graphopt.ir.text.names import comment_text, weight_text

VERSION = 1
NUMBERED = re.compile(r"(.*?(?<![^.]))(0|[1-9][0-9]{0,17})((?:\..*)?)")


class Printer:
    """Prints one graph: knows the number of each node and the name of each symbolic size."""

    def __init__(self, graph: Graph, canonical: bool = False) -> None:
        self.graph = graph
        self.canonical = canonical
        self._numbers: dict[fx.Node, str] = {}
        self._sizes: dict[sympy.Expr, str] = {}
        self._symbols = {sympy.Symbol(s, integer=True): n for s, n in graph.symbols.items()}
        self._names = {str(symbol): name for symbol, name in self._symbols.items()}

    def text(self) -> str:
        """The whole graph."""
        graph = self.graph
        lines = [f"gir {VERSION}", f"graph {json.dumps(graph.name)} {graph.dialect}"]
        lines += [limit.line(has_source=not self.canonical) for limit in graph.limits]
        kinds = {spec.name: spec.kind for spec in graph.inputs}
        weights: dict[str, fx.Node] = {}
        body: list[str] = []
        count = 0
        for node in graph.nodes:
            if node.op == "placeholder":
                name = str(node.target)
                self._numbers[node] = value_name(node)
                lines.append(f"input %{name} : {self.type(node.meta['val'])} {kinds[name]}")
            elif node.op == "get_attr":
                weights[str(node.target)] = node
                self._numbers[node] = value_name(node)
            elif node.op == "call_function":
                self._numbers[node] = f"%{count}" if self.canonical else value_name(node)
                body.append(self._line(node))
                count += 1
        lines += map(self._assumption, graph.assumptions)
        types = {
            weight_text(name): self.type(weights[name].meta["val"]) for name in sorted(weights)
        }
        lines += [f"weight @{name} : {kind}" for name, kind in _alike(types)]
        outputs = ", ".join(self._numbers[n] for n in graph.output_nodes)
        return "\n".join([*lines, *body, f"return {outputs}", ""])

    def _assumption(self, made: Assumption) -> str:
        is_input = made.subject in {spec.name for spec in self.graph.inputs}
        subject = f"%{made.subject}" if is_input else json.dumps(made.subject)
        line, layer = f"assume {made.code} {subject}", comment_text(made.layer)
        if self.canonical:
            return f"{line}  # {layer}" if layer else line
        return f"{line}  # {layer} | {comment_text(made.source)} | {made.site}"

    def _line(self, node: fx.Node) -> str:
        arguments = [self.value(a) for a in node.args]
        arguments += [f"{key}={self.value(value)}" for key, value in _told(node)]
        call = f"{op_name(node)}({', '.join(arguments)})"
        layer = comment_text(node.meta["layer"])
        left = f"{self._numbers[node]} : {self.type(node.meta['val'])}"
        if self.canonical:
            return f"{left} = {call}  # {layer}" if layer else f"{left} = {call}"
        line = f"{left} = {call}  # {layer} | {comment_text(node.meta['source'])}"
        if node.meta["history"] == {self._numbers[node]}:
            return line
        return f"{line} | {write_history(node.meta['history'])}"

    def type(self, value: Any) -> str:
        """`f32[batch, 64]`, `size[sequence]`, `(f32[2], i64[2])`, `none` of a call that writes."""
        if value is None:
            return "none"
        if isinstance(value, Tensor):
            if value.dtype not in DTYPE_NAMES or value.layout != torch.strided:
                raise VerifyError(f"a tensor of {value.dtype} ({value.layout}) has no textual form")
            sizes = ", ".join(self.size(s) for s in value.shape)
            return f"{DTYPE_NAMES[value.dtype]}[{sizes}]"
        if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
            return f"size[{self.size(value)}]"
        if isinstance(value, (tuple, list)):
            return f"({', '.join(self.type(v) for v in value)})"
        if isinstance(value, (torch.SymFloat, float)):
            return "float"
        if isinstance(value, (torch.SymBool, bool)):
            return "bool"
        raise VerifyError(f"a value of type {type(value).__name__} has no textual form")

    def size(self, value: int | torch.SymInt) -> str:
        """One size; symbols by their readable names."""
        if isinstance(value, int):
            return str(value)
        expr = value.node.expr
        if expr not in self._sizes:
            renamed = {
                symbol: sympy.Symbol(self._name(symbol))
                for symbol in sorted(expr.free_symbols, key=str)
            }
            self._sizes[expr] = str(expr.xreplace(renamed))
        return self._sizes[expr]

    def _name(self, symbol: sympy.Symbol) -> str:
        return self._names.setdefault(str(symbol), f"n{len(self._names)}")

    def value(self, value: Any) -> str:
        """One argument."""
        if isinstance(value, fx.Node):
            return self._numbers[value]
        if value is None or isinstance(value, (bool, int)):
            return str(value)
        if isinstance(value, float):
            return (
                repr(value) if math.isfinite(value) else f"float.{value}".replace(".-", ".minus_")
            )
        if isinstance(value, str):
            return json.dumps(value)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self.value(v) for v in value)}]"
        if isinstance(value, torch.dtype) and value in DTYPE_NAMES:
            return f"dtype.{DTYPE_NAMES[value]}"
        if isinstance(value, torch.device):
            return f"device.{value.type}"
        if isinstance(value, torch.layout):
            return f"layout.{str(value).removeprefix('torch.')}"
        if isinstance(value, torch.memory_format):
            return f"memory_format.{str(value).removeprefix('torch.')}"
        told = str(value) if isinstance(value, torch.dtype) else f"of type {type(value).__name__}"
        raise VerifyError(f"an argument {told} has no textual form")


def _told(node: fx.Node) -> list[tuple[str, Any]]:
    """Keyword arguments by name, those that the op assumes anyway left out."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return sorted(node.kwargs.items())
    assumed = {a.name: a.default_value for a in node.target._schema.arguments if a.kwarg_only}
    return [
        (key, value)
        for key, value in sorted(node.kwargs.items())
        if key not in assumed
        or type(value) is not type(assumed[key])
        or isinstance(value, fx.Node)
        or value != assumed[key]
    ]


def _alike(types: Mapping[str, str]) -> list[tuple[str, str]]:
    """Names and types; names with one type that differ only in their first number are one name:
    `a.{0-2}.b`, where no number is missing."""
    families: dict[tuple[str, str, str], list[int]] = {}
    for name, kind in types.items():
        match = NUMBERED.fullmatch(name)
        head, number, tail = match.groups() if match else (name, "-1", "")
        families.setdefault((head, tail, kind), []).append(int(number))
    lines = []
    for (head, tail, kind), numbers in families.items():
        first, last = min(numbers), max(numbers)
        if len(numbers) > 1 and last - first + 1 == len(numbers):
            lines.append((f"{head}{{{first}-{last}}}{tail}", kind))
        else:
            lines += [(head if n < 0 else f"{head}{n}{tail}", kind) for n in sorted(numbers)]
    return lines


def print_graph(graph: Graph) -> str:
    """`graph` as text; see the module docstring."""
    return Printer(graph).text()


def canonical_text(graph: Graph) -> str:
    """`graph` in the canonical form: what golden files hold."""
    return Printer(graph, canonical=True).text()
