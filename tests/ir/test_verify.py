"""Each invariant of the verifier, broken once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.run_graph import apply
from helpers.tiny_models import tiny_llama
from torch import fx

from graphopt.capture import capture
from graphopt.errors import VerifyError
from graphopt.ir.graph import Graph, InputSpec
from graphopt.ir.verify import verify

aten = torch.ops.aten


@pytest.fixture
def graph() -> Graph:
    return capture(tiny_llama(layers=1))


def first(graph: Graph, target: object) -> fx.Node:
    return graph.calls(target)[0]


def drop_val(graph: Graph) -> None:
    del first(graph, aten.linear.default).meta["val"]


def drop_history(graph: Graph) -> None:
    del first(graph, aten.linear.default).meta["history"]


def wrong_shape(graph: Graph) -> None:
    node = first(graph, aten.silu.default)
    node.meta["val"] = node.meta["val"].transpose(0, 1)


def wrong_dtype(graph: Graph) -> None:
    node = first(graph, aten.silu.default)
    node.meta["val"] = node.meta["val"].double()


def ill_typed(graph: Graph) -> None:
    node = first(graph, aten.transpose.int)
    node.args = (node.args[0], 1, 9)


def dead(graph: Graph) -> None:
    node = first(graph, aten.silu.default)
    with graph.fx_graph.inserting_after(node):
        new = graph.fx_graph.call_function(aten.neg.default, (node,))
    new.meta = {**node.meta, "number": graph.take_number()}


def same_number(graph: Graph) -> None:
    first(graph, aten.silu.default).meta["number"] = first(graph, aten.linear.default).meta[
        "number"
    ]


def use_before_definition(graph: Graph) -> None:
    node = first(graph, aten.linear.default)
    node.args = (graph.output_nodes[0], node.args[1])


def foreign_op(graph: Graph) -> None:
    first(graph, aten.silu.default).target = print


def undeclared_input(graph: Graph) -> None:
    graph.inputs = (*graph.inputs, InputSpec("ghost"))


def missing_weight(graph: Graph) -> None:
    del graph.weights["model.norm.weight"]


def reshaped_weight(graph: Graph) -> None:
    graph.weights["model.norm.weight"] = torch.zeros(3)


def method_call(graph: Graph) -> None:
    node = first(graph, aten.silu.default)
    with graph.fx_graph.inserting_before(node):
        new = graph.fx_graph.call_method("abs", (node.args[0],))
    new.meta = dict(node.meta)
    node.args = (new,)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_val, "has no 'val'"),
        (drop_history, "has no 'history'"),
        (wrong_shape, "its operands give"),
        (wrong_dtype, "its operands give"),
        (ill_typed, "does not type-check"),
        (dead, "is dead"),
        (same_number, "no number of its own"),
        (use_before_definition, "before it is defined"),
        (foreign_op, "not an op of the IR"),
        (undeclared_input, "declared are"),
        (missing_weight, "has no data"),
        (reshaped_weight, "its node says"),
        (method_call, "not part of the IR"),
    ],
)
def test_damage_is_found(graph: Graph, damage: Callable[[Graph], None], message: str) -> None:
    verify(graph)
    damage(graph)
    with pytest.raises(VerifyError, match=message) as error:
        verify(graph, after="some_pass")
    assert "after some_pass" in str(error.value)


def test_writing_to_anything_but_a_cache_is_found() -> None:
    graph = capture(tiny_llama(layers=1))
    apply(graph, "insert_kv_cache")
    verify(graph)
    graph.inputs = tuple(InputSpec(spec.name) for spec in graph.inputs)
    with pytest.raises(VerifyError, match="no cache input"):
        verify(graph)
