"""Every row of the cleanup tables, one op at a time: an op without a case fails its test.

The graphs are built op by op, so that nothing but the pass under test respells them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.op_graph import OpGraph
from helpers.run_graph import apply, run
from torch import Tensor

from graphopt.passes.cleanup import canonicalize_views as views
from graphopt.passes.cleanup import remove_noops as noops

aten = torch.ops.aten
X = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))


def _single(op: Any, *args: Any, x: Tensor = X, **kwargs: Any) -> OpGraph:
    """x -> op -> cos, returned: a graph whose memory nobody holds."""
    g = OpGraph()
    node = g.call(op, g.call(aten.abs.default, g.input("x", x)), *args, **kwargs)
    g.returns(g.call(aten.mul.Scalar, node, 3))
    return g


def _after(g: OpGraph, name: str) -> list[tuple[str, Any]]:
    """(op, further arguments) of the calls that `name` makes of the middle one."""
    graph = g.graph
    before = run(graph, *g.inputs)
    apply(graph, name)
    assert torch.equal(run(graph, *g.inputs), before)
    return [(str(n.target), n.args[1:]) for n in graph.nodes if n.op == "call_function"][1:-1]


# Further arguments with an axis counted from the end, and with the same axis from the front.
NEGATIVE: dict[object, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    aten.transpose.int: ((-1, -2), (2, 1)),
    aten.unsqueeze.default: ((-2,), (2,)),
    aten.slice.Tensor: ((-1, 1, 4), (2, 1, 4)),
    aten.select.int: ((-3, 1), (0, 1)),
    aten.softmax.int: ((-1,), (2,)),
}


@pytest.mark.parametrize("op", dict.fromkeys((*views._DIMS, *NEGATIVE)), ids=str)
def test_every_op_counts_its_axes_from_the_front(op: Any) -> None:
    assert op in NEGATIVE, f"{op} has a row and no case"
    assert op in views._DIMS, f"{op} has a case and no row"
    negative, positive = NEGATIVE[op]
    assert _after(_single(op, *negative), "canonicalize_views") == [(str(op), positive)]
    # What is canonical stays as it is, the first axis too.
    assert _after(_single(op, *positive), "canonicalize_views") == [(str(op), positive)]
    if len(views._DIMS[op][0]) == 1:
        rest = positive[1:]
        first = _after(_single(op, 0, *rest), "canonicalize_views")
        assert first == [(str(op), (0, *rest))]


def test_each_axis_of_a_transpose_is_counted_alone() -> None:
    for given in ((-1, 0), (2, -3), (0, -1), (-3, 2)):
        wanted = tuple(d % 3 for d in given)
        found = _after(_single(aten.transpose.int, *given), "canonicalize_views")
        assert found == [("aten.transpose.int", wanted)]


RESHAPES: dict[object, tuple[tuple[Any, ...], list[int]]] = {
    aten.view.default: (([12, 5],), [12, 5]),
    aten._unsafe_view.default: (([3, 20],), [3, 20]),
    aten.flatten.using_ints: ((1, 2), [3, 20]),
    aten.unflatten.int: ((1, [2, 2]), [3, 2, 2, 5]),
    aten.view_as.default: ((torch.zeros(60),), [60]),
    aten.reshape_as.default: ((torch.zeros(4, 15),), [4, 15]),
}


@pytest.mark.parametrize("op", dict.fromkeys((*views._VIEWS, *RESHAPES)), ids=str)
def test_every_view_is_a_reshape(op: Any) -> None:
    args, sizes = RESHAPES[op]
    g = OpGraph()
    x = g.call(aten.abs.default, g.input("x", X))
    given = [g.weight("other", a) if isinstance(a, Tensor) else a for a in args]
    g.returns(g.call(aten.mul.Scalar, g.call(op, x, *given), 3))
    (found,) = [c for c in _after(g, "canonicalize_views") if "reshape" in c[0]]
    assert found == ("aten.reshape.default", (sizes,))


@pytest.mark.parametrize(
    "op", dict.fromkeys((*views._MATRIX_TRANSPOSES, aten.mT.default, aten.t.default))
)
def test_every_matrix_transpose_is_a_transpose(op: Any) -> None:
    for rank in (2, 3):
        if op is aten.t.default and rank > 2:
            continue
        assert op in views._MATRIX_TRANSPOSES
        found = _after(_single(op, x=X[(0,) * (3 - rank)]), "canonicalize_views")
        assert found == [("aten.transpose.int", (rank - 2, rank - 1))]


def test_a_vector_has_nothing_to_transpose() -> None:
    vector = _single(aten.t.default, x=torch.randn(5))
    assert _after(vector, "canonicalize_views") == [("aten.t.default", ())]


@pytest.mark.parametrize(
    ("dims", "wanted"),
    [
        ([0, 2, 1], ("aten.transpose.int", (1, 2))),
        ([-1, 1, 0], ("aten.transpose.int", (0, 2))),
        ([1, 2, 0], ("aten.permute.default", ([1, 2, 0],))),
        ([0, 1, 2], ("aten.permute.default", ([0, 1, 2],))),
    ],
)
def test_a_permute_of_two_axes_is_a_transpose(dims: list[int], wanted: Any) -> None:
    assert _after(_single(aten.permute.default, dims), "canonicalize_views") == [wanted]


Case = tuple[tuple[Any, ...], dict[str, Any]]
COPIES: dict[object, Case] = {
    aten.to.dtype: ((torch.float32,), {}),
    aten.to.device: (("cpu", torch.float32), {}),
    aten.to.dtype_layout: ((), {"dtype": torch.float32}),
    aten.to.other: ((torch.zeros(2),), {}),
    aten.type_as.default: ((torch.zeros(2),), {}),
    aten._to_copy.default: ((), {"dtype": torch.float32}),
    aten.alias.default: ((), {}),
    aten.detach.default: ((), {}),
    aten.detach_.default: ((), {}),
    aten.lift_fresh_copy.default: ((), {}),
    aten.clone.default: ((), {}),
    aten.contiguous.default: ((), {}),
    aten.expand.default: (([3, 4, 5],), {}),
    aten.view.default: (([3, 4, 5],), {}),
    aten.reshape.default: (([3, -1, 5],), {}),
    aten._unsafe_view.default: (([3, 4, 5],), {}),
    aten.flatten.using_ints: ((1, 1), {}),
    aten.mul.Tensor: ((1.0,), {}),
    aten.mul.Scalar: ((1,), {}),
    aten.div.Tensor: ((1.0,), {}),
    aten.div.Scalar: ((1,), {}),
    aten.dropout.default: ((0.5, False), {}),
    aten.slice.Tensor: ((1, 0, 9), {}),
}
ZEROS = (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)


@pytest.mark.parametrize(
    "op", dict.fromkeys((*noops._COPIES, *noops._SHAPES, *noops._ONES, *COPIES)), ids=str
)
def test_every_op_that_returns_its_operand_is_removed(op: Any) -> None:
    args, kwargs = COPIES[op]
    g = OpGraph()
    x = g.call(aten.abs.default, g.input("x", X))
    given = [g.weight("other", a) if isinstance(a, Tensor) else a for a in args]
    g.returns(g.call(aten.mul.Scalar, g.call(op, x, *given, **kwargs), 3))
    assert _after(g, "remove_noops") == []


@pytest.mark.parametrize("op", dict.fromkeys((*noops._ZEROS, *ZEROS)), ids=str)
def test_an_integer_zero_is_removed_and_a_float_zero_stays(op: Any) -> None:
    assert op in ZEROS
    assert op in noops._ZEROS
    assert _after(_single(op, 0, x=torch.arange(6)), "remove_noops") == []
    assert len(_after(_single(op, 0), "remove_noops")) == 1
    assert len(_after(_single(op, 1, x=torch.arange(6)), "remove_noops")) == 1


LOOK_ALIKES: dict[str, Callable[[], OpGraph]] = {
    "another dtype": lambda: _single(aten.to.dtype, torch.float64),
    "active dropout of nothing": lambda: _single(aten.dropout.default, 0.0, True),
    "every second": lambda: _single(aten.slice.Tensor, 1, 0, 9, 2, x=torch.randn(3, 1)),
    "a part": lambda: _single(aten.slice.Tensor, 1, 1, 9),
    "another shape": lambda: _single(aten.reshape.default, [3, 20]),
    "twice": lambda: _single(aten.mul.Scalar, 2),
    "divided and rounded": lambda: _single(aten.div.Scalar_mode, 1, rounding_mode="floor"),
    "divided by one and rounded": lambda: _single(aten.div.Tensor_mode, 1, rounding_mode="floor"),
    "true is a number in torch": lambda: _single(aten.mul.Tensor, True, x=torch.arange(4)),
    "minus": lambda: _single(aten.mul.Scalar, -1),
    "a sum of itself": lambda: _single(aten.add.Tensor, 1),
}
REMOVED = {"active dropout of nothing"}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_of_no_ops(name: str) -> None:
    found = _after(LOOK_ALIKES[name](), "remove_noops")
    assert (found == []) == (name in REMOVED)
