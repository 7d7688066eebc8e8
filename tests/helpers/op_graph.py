"""Graphs built op by op, without a model and without cleanup: each op stays as it is spelled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from graphopt.ir.builder import GraphBuilder
from graphopt.ir.graph import Graph, InputSpec, graph_module


class OpGraph:
    """A graph over fixed sizes, with the real value of every node."""

    def __init__(self) -> None:
        self.graph = Graph("ops", graph_module(fx.Graph()), (), {})
        self.values: dict[fx.Node, Tensor] = {}
        self._builder = GraphBuilder(self.graph, FakeTensorMode(shape_env=ShapeEnv()))

    def input(self, name: str, value: Tensor) -> fx.Node:
        """A placeholder."""
        with self._builder.mode:
            fake = torch.empty(value.shape, dtype=value.dtype)
        node = self._builder.input(name, fake)
        self.graph.inputs = (*self.graph.inputs, InputSpec(name))
        self.values[node] = value
        return node

    def weight(self, name: str, value: Tensor) -> fx.Node:
        """A constant."""
        node = self._builder.weight(name, value, like=[])
        self.values[node] = value
        return node

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call, computed at once."""
        node = self._builder.emit(op, args, kwargs, like=[])
        real, named = fx.node.map_arg((args, kwargs), self.values.__getitem__)
        self.values[node] = op(*real, **named)
        return node

    def returns(self, *nodes: fx.Node) -> Graph:
        """The finished graph, whose outputs are `nodes`."""
        self.graph.fx_graph.output(tuple(nodes))
        return self.graph

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Values of the placeholders."""
        return tuple(v for node, v in self.values.items() if node.op == "placeholder")
