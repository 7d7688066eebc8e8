"""`define` in other namespaces: what it makes and refuses, and where such an op may be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.errors import ProgramFormatError, RowDependenceError, UnsupportedError
from graphopt.ir.opset import Cost, OpSpec, define, load_all, spec_of
from graphopt.ir.text.parser import parse_graph
from graphopt.ir.text.printer import print_graph
from graphopt.ops import swiglu


def reference(x: Tensor) -> Tensor:
    return x.relu().square()


def fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def cost(x: Tensor) -> Cost:
    return Cost(2.0 * x.numel(), 0.0)


def defined(schema: str, **more: Any) -> OpSpec:
    return define(schema, reference=reference, fake=fake, cost=cost, **more)


POINTWISE = defined("testops::squared(Tensor x) -> Tensor", rows="pointwise")
UNKNOWN = defined("testops::squared_unknown(Tensor x) -> Tensor")


class Model(nn.Module):
    """A language model with one call of an op."""

    def __init__(self, spec: OpSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.spec.overload(self.embed(ids)))


IDS = torch.zeros((2, 5), dtype=torch.int64)


def test_an_op_of_another_namespace() -> None:
    assert POINTWISE.name == "testops.squared"
    assert load_all()["testops.squared"] is POINTWISE
    assert spec_of(torch.ops.testops.squared.default) is POINTWISE
    x = torch.randn(3)
    assert torch.equal(torch.ops.testops.squared(x), reference(x))
    assert spec_of(torch.ops.aten.relu.default) is None


def test_its_text_reads_back_and_one_nobody_defined_does_not() -> None:
    graph = capture(Model(POINTWISE).eval(), IDS)
    text = print_graph(graph)
    assert "testops.squared(%" in text
    assert parse_graph(text, graph.weights).op_counts() == graph.op_counts()
    message = r"line \d+ .*'nobody\.squared': no installed plugin defines .* 'nobody'; there are"
    with pytest.raises(ProgramFormatError, match=message):
        parse_graph(text.replace("testops.squared", "nobody.squared"), graph.weights)
    with pytest.raises(ProgramFormatError, match=r"unknown op 'testops\.cubed'"):
        parse_graph(text.replace("testops.squared", "testops.cubed"), graph.weights)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_rows_that_stand_alone_are_served(backend: str) -> None:
    model = Model(POINTWISE).eval()
    program = graphopt.compile(model, IDS, backend=backend, serving="required")
    assert program.serving is not None
    assert program.serving.op_counts()["testops.squared"] == 1
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        assert torch.allclose(program(ids), model(ids), atol=1e-5)


def test_rows_of_which_nothing_is_said_are_not() -> None:
    message = r"testops\.squared_unknown reads token rows .* define it with rows=\"pointwise\""
    with pytest.raises(RowDependenceError, match=message):
        graphopt.compile(Model(UNKNOWN).eval(), IDS, backend="reference", serving="required")


@pytest.mark.parametrize(
    ("schema", "more", "message"),
    [
        ("aten::mine(Tensor x) -> Tensor", {}, "a namespace other than aten"),
        ("prims::mine(Tensor x) -> Tensor", {}, "a namespace other than aten"),
        ("a.b::mine(Tensor x) -> Tensor", {}, "cannot be defined"),
        ("testops::(Tensor x) -> Tensor", {}, "cannot be defined"),
        ("testops::mine(Tensor x) -> Tensor", {"rows": "each"}, "rows='each' is not supported"),
        (
            "testops::squared(Tensor x) -> Tensor",
            {},
            r"'testops\.squared' is defined twice: by .*test_opset and by .*test_opset",
        ),
        (swiglu.SCHEMA, {}, r"'graphopt\.swiglu' is defined twice: by graphopt and by .*test_op"),
    ],
)
def test_ops_that_cannot_be_defined(schema: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        defined(schema, **more)
    assert "testops.mine" not in load_all()
