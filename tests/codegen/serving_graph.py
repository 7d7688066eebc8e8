"""Serving graphs made by hand: the inputs of a step, whatever a test computes, a row of logits."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from helpers.tiny_models import tiny_llama
from torch import Tensor, fx

import graphopt
from graphopt.ir.builder import GraphBuilder
from graphopt.ir.graph import Graph

aten = torch.ops.aten
WIDTH, VOCABULARY = 48, 101


@cache
def _base() -> Graph:
    serving = graphopt.compile(tiny_llama(layers=1), backend="reference").serving
    assert serving is not None
    return serving


class ServingGraph:
    """A serving graph under construction: the inputs of a step and one layer's caches."""

    def __init__(self) -> None:
        self.graph = _base().copy()
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        self.inputs = {str(n.target): n for n in self.graph.nodes if n.op == "placeholder"}
        output.args = ((self.inputs["tokens"],),)
        for node in reversed(list(self.graph.nodes)):
            if node.op in ("call_function", "get_attr"):
                self.graph.fx_graph.erase_node(node)
        self.graph.weights.clear()
        self.builder = GraphBuilder(self.graph)
        self._output = output

    def emit(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of `op`."""
        with self.graph.fx_graph.inserting_before(self._output):
            return self.builder.emit(op, args, kwargs, like=[self.inputs["tokens"]])

    def weight(self, tensor: Tensor, name: str = "") -> fx.Node:
        """A weight of the graph."""
        name = name or f"w{len(self.graph.weights)}"
        with self.graph.fx_graph.inserting_before(self._output):
            return self.builder.weight(name, tensor, like=[self.inputs["tokens"]])

    def ids(self) -> fx.Node:
        """Token ids, [1, rows]."""
        return self.emit(aten.unsqueeze.default, self.inputs["tokens"], 0)

    def rows(self) -> fx.Node:
        """The number of token rows."""
        return self.emit(aten.sym_size.int, self.inputs["tokens"], 0)

    def x(self, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> fx.Node:
        """Floats that depend on the token, [1, rows, width]."""
        table = self.weight(torch.randn(VOCABULARY, width).to(dtype))
        return self.emit(aten.embedding.default, table, self.ids())

    def positive(self) -> fx.Node:
        """Floats above zero."""
        table = self.weight(torch.rand(VOCABULARY, WIDTH) + 0.1)
        return self.emit(aten.embedding.default, table, self.ids())

    def split_heads(self, heads: int = 4, size: int = 12, dtype: Any = torch.float32) -> fx.Node:
        """[1, heads, rows, size], as models make it."""
        wide = self.x(heads * size, dtype)
        parts = self.emit(aten.reshape.default, wide, [1, self.rows(), heads, size])
        return self.emit(aten.transpose.int, parts, 1, 2)

    def merge_heads(self, heads: fx.Node) -> fx.Node:
        """[1, rows, heads * size] again."""
        back = self.emit(aten.transpose.int, heads, 1, 2)
        return self.emit(aten.reshape.default, back, [1, self.rows(), -1])

    def finish(self, result: fx.Node) -> Graph:
        """The graph that returns the wanted rows of `result`, [1, rows, any]."""
        rows = self.emit(aten.index_select.default, result, 1, self.inputs["logit_rows"])
        logits = self.emit(aten.squeeze.dim, rows, 0)
        self._output.args = ((logits,),)
        return self.graph
