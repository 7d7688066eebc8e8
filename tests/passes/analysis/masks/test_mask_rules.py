"""Every op that the mask algebra reads: what is read is what torch computes, on a grid.

The cases are looked up by the rules' own tables: an op without a case fails the test.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from mask_graphs import MaskGraph
from torch import fx

from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks.arithmetic import ARITHMETIC
from graphopt.passes.analysis.masks.numbers import NUMBERS
from graphopt.passes.analysis.masks.values import PRODUCT
from graphopt.passes.analysis.masks.views import MOVING

aten = torch.ops.aten
ROWS, COLUMNS = 5, 7
LOW = torch.finfo(torch.float32).min


class Base(MaskGraph):
    """Indices i, j; conditions c, d; numbers x; masks of 0 and 1 with axes of size 1."""

    def __init__(self) -> None:
        super().__init__()
        self.j = self.call(aten.arange.default, COLUMNS)
        self.i = self.call(aten.unsqueeze.default, self.call(aten.arange.default, ROWS), 1)
        self.c = self.call(aten.le.Tensor, self.j, self.i)
        self.d = self.call(aten.gt.Scalar, self.j, 2)
        self.y = self.call(aten.full.default, [], -2.0)
        self.x = self.call(aten.where.ScalarSelf, self.c, 0.5, self.y)
        self.q = self.call(aten.view.default, self.x, [1, ROWS, 1, COLUMNS])
        self.bits = self.input("bits", torch.tensor([[1, 0, 1, 1, 0, 1, 0]]).repeat(3, 1))


Case = Callable[[Base], fx.Node]
CASES: dict[object, tuple[Case, ...]] = {
    aten.add.Tensor: (
        lambda g: g.call(aten.add.Tensor, g.i, g.j),
        lambda g: g.call(aten.add.Tensor, g.x, g.x),
        # An axis of size 1 has one index, whatever it is broadcast to.
        lambda g: g.call(aten.add.Tensor, g.call(aten.arange.default, 1), g.j),
    ),
    aten.add.Scalar: (
        lambda g: g.call(aten.add.Scalar, g.j, 3),
        lambda g: g.call(aten.add.Scalar, g.x, 0.25),
    ),
    aten.sub.Tensor: (
        lambda g: g.call(aten.sub.Tensor, g.i, g.j),
        lambda g: g.call(aten.sub.Tensor, g.x, g.y),
    ),
    aten.sub.Scalar: (lambda g: g.call(aten.sub.Scalar, g.j, 3),),
    aten.mul.Tensor: (
        lambda g: g.call(aten.mul.Tensor, g.x, g.x),
        lambda g: g.call(aten.mul.Tensor, g.c, g.d),
        lambda g: g.call(aten.mul.Tensor, g.call(aten.to.dtype, g.c, torch.int64), g.j),
    ),
    aten.mul.Scalar: (lambda g: g.call(aten.mul.Scalar, g.j, -3),),
    aten.div.Tensor: (
        lambda g: g.call(aten.div.Tensor, g.x, g.y),
        lambda g: g.call(aten.div.Tensor, g.i, g.y),
    ),
    aten.div.Scalar: (lambda g: g.call(aten.div.Scalar, g.x, 4.0),),
    aten.div.Tensor_mode: (
        lambda g: g.call(aten.div.Tensor_mode, g.x, g.y, rounding_mode="floor"),
        lambda g: g.call(aten.div.Tensor_mode, g.x, g.y, rounding_mode="trunc"),
    ),
    aten.div.Scalar_mode: (lambda g: g.call(aten.div.Scalar_mode, g.j, 3, rounding_mode="floor"),),
    aten.minimum.default: (
        lambda g: g.call(aten.minimum.default, g.x, g.y),
        lambda g: g.call(aten.minimum.default, g.call(aten.full.default, [], 3), g.one),
    ),
    aten.min.other: (lambda g: g.call(aten.min.other, g.x, g.y),),
    aten.maximum.default: (lambda g: g.call(aten.maximum.default, g.x, g.y),),
    aten.max.other: (lambda g: g.call(aten.max.other, g.x, g.y),),
    aten.rsub.Tensor: (lambda g: g.call(aten.rsub.Tensor, g.i, g.j),),
    aten.rsub.Scalar: (
        lambda g: g.call(aten.rsub.Scalar, g.j, 1),
        lambda g: g.call(aten.rsub.Scalar, g.x, 1.0),
    ),
    aten.neg.default: (
        lambda g: g.call(aten.neg.default, g.j),
        lambda g: g.call(aten.neg.default, g.x),
    ),
    aten.abs.default: (
        lambda g: g.call(aten.abs.default, g.call(aten.sub.Tensor, g.i, g.j)),
        lambda g: g.call(aten.abs.default, g.x),
    ),
    aten.tanh.default: (lambda g: g.call(aten.tanh.default, g.x),),
    aten.floor_divide.default: (
        lambda g: g.call(aten.floor_divide.default, g.call(aten.sub.Tensor, g.i, g.j), 3),
    ),
    aten.floor_divide.Scalar: (lambda g: g.call(aten.floor_divide.Scalar, g.j, 4),),
    aten.remainder.Tensor: (
        lambda g: g.call(aten.remainder.Tensor, g.one, g.call(aten.full.default, [], 3)),
    ),
    aten.remainder.Scalar: (
        lambda g: g.call(aten.remainder.Scalar, g.call(aten.sub.Tensor, g.i, g.j), 3),
    ),
    aten.remainder.Scalar_Tensor: (lambda g: g.call(aten.remainder.Scalar_Tensor, 7, g.one),),
    aten.bitwise_and.Tensor: (lambda g: g.call(aten.bitwise_and.Tensor, g.c, g.d),),
    aten.bitwise_and.Scalar: (lambda g: g.call(aten.bitwise_and.Scalar, g.c, True),),
    aten.__and__.Tensor: (lambda g: g.call(aten.__and__.Tensor, g.c, g.d),),
    aten.__and__.Scalar: (lambda g: g.call(aten.__and__.Scalar, g.c, False),),
    aten.bitwise_or.Tensor: (lambda g: g.call(aten.bitwise_or.Tensor, g.c, g.d),),
    aten.bitwise_or.Scalar: (lambda g: g.call(aten.bitwise_or.Scalar, g.c, True),),
    aten.__or__.Tensor: (lambda g: g.call(aten.__or__.Tensor, g.c, g.d),),
    aten.__or__.Scalar: (lambda g: g.call(aten.__or__.Scalar, g.c, False),),
    aten.bitwise_xor.Tensor: (lambda g: g.call(aten.bitwise_xor.Tensor, g.c, g.d),),
    aten.__xor__.Tensor: (lambda g: g.call(aten.__xor__.Tensor, g.c, g.d),),
    aten.logical_and.default: (lambda g: g.call(aten.logical_and.default, g.c, g.d),),
    aten.logical_or.default: (
        lambda g: g.call(aten.logical_or.default, g.c, g.d),
        lambda g: g.call(aten.logical_or.default, g.j, g.c),
    ),
    aten.logical_xor.default: (lambda g: g.call(aten.logical_xor.default, g.c, g.d),),
    aten.logical_not.default: (
        lambda g: g.call(aten.logical_not.default, g.c),
        lambda g: g.call(aten.logical_not.default, g.j),
    ),
    aten.bitwise_not.default: (lambda g: g.call(aten.bitwise_not.default, g.c),),
    aten.where.self: (lambda g: g.call(aten.where.self, g.d, g.x, g.y),),
    aten.where.ScalarOther: (lambda g: g.call(aten.where.ScalarOther, g.d, g.x, -math.inf),),
    aten.where.ScalarSelf: (lambda g: g.call(aten.where.ScalarSelf, g.d, 1.0, g.x),),
    aten.where.Scalar: (lambda g: g.call(aten.where.Scalar, g.d, 1.0, 2.0),),
    aten.masked_fill.Scalar: (lambda g: g.call(aten.masked_fill.Scalar, g.x, g.d, -1e9),),
    aten.masked_fill.Tensor: (lambda g: g.call(aten.masked_fill.Tensor, g.x, g.d, g.y),),
    aten.tril.default: tuple(
        lambda g, shift=shift: g.call(aten.tril.default, g.x, shift) for shift in (-2, 0, 1)
    ),
    aten.triu.default: tuple(
        lambda g, shift=shift: g.call(aten.triu.default, g.c, shift) for shift in (-2, 0, 1)
    ),
    aten.ones.default: (lambda g: g.call(aten.ones.default, [2, 3]),),
    aten.ones_like.default: (lambda g: g.call(aten.ones_like.default, g.j),),
    aten.new_ones.default: (lambda g: g.call(aten.new_ones.default, g.x, [2, 3]),),
    aten.zeros.default: (lambda g: g.call(aten.zeros.default, [2, 3], dtype=torch.bool),),
    aten.zeros_like.default: (lambda g: g.call(aten.zeros_like.default, g.x),),
    aten.new_zeros.default: (lambda g: g.call(aten.new_zeros.default, g.j, [2]),),
    aten.full.default: (lambda g: g.call(aten.full.default, [2, 3], -math.inf),),
    aten.full_like.default: (lambda g: g.call(aten.full_like.default, g.x, 7.0),),
    aten.new_full.default: (lambda g: g.call(aten.new_full.default, g.j, [2], 3),),
    aten.scalar_tensor.default: (lambda g: g.call(aten.scalar_tensor.default, -1e9),),
    aten.arange.default: (
        lambda g: g.call(aten.arange.default, 4),
        lambda g: g.call(aten.arange.default, 4, dtype=torch.float32),
    ),
    aten.arange.start: (lambda g: g.call(aten.arange.start, 2, 6),),
    aten.arange.start_step: (
        lambda g: g.call(aten.arange.start_step, 9, 1, -2),
        lambda g: g.call(aten.arange.start_step, 1, 9, 3),
    ),
    aten.to.dtype: (
        lambda g: g.call(aten.to.dtype, g.c, torch.float32),
        lambda g: g.call(aten.to.dtype, g.j, torch.bool),
        lambda g: g.call(aten.to.dtype, g.x, torch.bool),
    ),
    aten.to.dtype_layout: (lambda g: g.call(aten.to.dtype_layout, g.c, dtype=torch.int64),),
    aten.to.device: (lambda g: g.call(aten.to.device, g.c, "cpu", torch.float32),),
    aten.to.other: (lambda g: g.call(aten.to.other, g.c, g.j),),
    aten._to_copy.default: (lambda g: g.call(aten._to_copy.default, g.j, dtype=torch.float32),),
    aten.type_as.default: (lambda g: g.call(aten.type_as.default, g.c, g.x),),
    aten.expand.default: (lambda g: g.call(aten.expand.default, g.i, [2, ROWS, 3]),),
    aten.expand_as.default: (lambda g: g.call(aten.expand_as.default, g.i, g.x),),
    aten.dropout.default: (lambda g: g.call(aten.dropout.default, g.x, 0.5, False),),
    aten.permute.default: (lambda g: g.call(aten.permute.default, g.q, [3, 0, 1, 2]),),
    aten.transpose.int: (lambda g: g.call(aten.transpose.int, g.q, 1, -1),),
    aten.t.default: (lambda g: g.call(aten.t.default, g.x),),
    aten.view.default: (
        lambda g: g.call(aten.view.default, g.x, [ROWS, 1, COLUMNS, 1]),
        lambda g: g.call(aten.view.default, g.x, [ROWS * COLUMNS]),
        lambda g: g.call(
            aten.view.default, g.call(aten.view.default, g.x, [35, 1]), [1, ROWS, COLUMNS]
        ),
    ),
    aten.reshape.default: (lambda g: g.call(aten.reshape.default, g.q, [-1, COLUMNS]),),
    aten._unsafe_view.default: (lambda g: g.call(aten._unsafe_view.default, g.x, [1, 35]),),
    aten.unsqueeze.default: (lambda g: g.call(aten.unsqueeze.default, g.x, 1),),
    aten.flatten.using_ints: (lambda g: g.call(aten.flatten.using_ints, g.q, 1, -1),),
    aten.unflatten.int: (
        lambda g: g.call(aten.unflatten.int, g.call(aten.arange.default, 12), 0, [2, 3, -1]),
    ),
    aten.squeeze.default: (lambda g: g.call(aten.squeeze.default, g.q),),
    aten.squeeze.dim: (lambda g: g.call(aten.squeeze.dim, g.q, 2),),
    aten.squeeze.dims: (lambda g: g.call(aten.squeeze.dims, g.q, [0, 2]),),
    aten.repeat.default: (
        lambda g: g.call(aten.repeat.default, g.x, [2, 3, 1]),
        lambda g: g.call(aten.repeat.default, g.i, [1, 4]),
    ),
    aten.repeat_interleave.self_int: (
        lambda g: g.call(aten.repeat_interleave.self_int, g.x, 3, 0),
        lambda g: g.call(aten.repeat_interleave.self_int, g.x, 2, -1),
    ),
    aten.flip.default: (lambda g: g.call(aten.flip.default, g.x, [0, -1]),),
    aten.slice.Tensor: (
        lambda g: g.call(aten.slice.Tensor, g.x, 1, 2, 6),
        lambda g: g.call(aten.slice.Tensor, g.x, -1, -4, 9223372036854775807, 2),
        lambda g: g.call(aten.slice.Tensor, g.j, 0, -COLUMNS - 3, 4),
    ),
    aten.select.int: (
        lambda g: g.call(aten.select.int, g.x, 0, 2),
        lambda g: g.call(aten.select.int, g.x, -1, -2),
    ),
    aten.index_select.default: (
        lambda g: g.call(aten.index_select.default, g.x, 0, g.call(aten.arange.start, 1, 3)),
        lambda g: g.call(aten.index_select.default, g.x, -1, g.call(aten.arange.start, 2, 5)),
    ),
    aten.index.Tensor: (
        lambda g: g.call(aten.index.Tensor, g.x, [None, g.call(aten.arange.start, 2, 5)]),
        lambda g: g.call(aten.index.Tensor, g.x, [g.i, g.call(aten.arange.default, 3)]),
    ),
    aten.cat.default: (
        lambda g: g.call(aten.cat.default, [g.x, g.q2, g.x], -1),
        lambda g: g.call(aten.cat.default, [g.c, g.c], 0),
    ),
    aten.diff.default: (
        lambda g: g.call(aten.diff.default, g.call(aten.mul.Scalar, g.j, 3), 1, -1),
        lambda g: g.call(aten.diff.default, g.j, 1, -1, prepend=g.call(aten.full.default, [1], -1)),
    ),
    aten.cumsum.default: (
        lambda g: g.call(aten.cumsum.default, g.call(aten.full.default, [2, 4], 3), -1),
        lambda g: g.call(aten.cumsum.default, g.call(aten.ones.default, [2, 4]), 0),
    ),
    aten.log.default: (
        lambda g: g.call(aten.log.default, g.call(aten.to.dtype, g.c, torch.float32)),
        lambda g: g.call(aten.log.default, g.call(aten.to.dtype, g.bits, torch.float32)),
        lambda g: g.call(aten.log.default, g.bits),
    ),
    aten.clamp.default: (
        lambda g: g.call(aten.clamp.default, g.x, -1.0, 0.0),
        lambda g: g.call(aten.clamp.default, g.scores, LOW, None),
        lambda g: g.call(aten.clamp.default, g.scores, LOW, math.inf),
    ),
    aten.clamp.Tensor: (lambda g: g.call(aten.clamp.Tensor, g.scores, g.lowest),),
    aten.clamp_min.default: (lambda g: g.call(aten.clamp_min.default, g.scores, LOW),),
    aten.clamp_min.Tensor: (lambda g: g.call(aten.clamp_min.Tensor, g.scores, g.lowest),),
    aten.clamp_max.default: (lambda g: g.call(aten.clamp_max.default, g.scores, -LOW),),
    aten.clamp_max.Tensor: (lambda g: g.call(aten.clamp_max.Tensor, g.x, g.y),),
}
for _copy in (aten.clone, aten.contiguous, aten.alias, aten.detach, aten.lift_fresh_copy):
    CASES[_copy.default] = (
        lambda g, op=_copy.default: g.call(op, g.x),
        lambda g, op=_copy.default: g.call(op, g.half),
    )
CASES[aten.detach_.default] = CASES[aten.detach.default]
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    _tensor, _scalar = getattr(aten, _name).Tensor, getattr(aten, _name).Scalar
    CASES[_tensor] = (
        lambda g, op=_tensor: g.call(op, g.i, g.j),
        lambda g, op=_tensor: g.call(op, g.call(aten.mul.Scalar, g.i, 2), g.j),
        lambda g, op=_tensor: g.call(op, g.x, g.y),
    )
    CASES[_scalar] = (
        lambda g, op=_scalar: g.call(op, g.j, 3),
        lambda g, op=_scalar: g.call(op, g.x, -1.0),
        lambda g, op=_scalar: g.call(op, g.call(aten.to.dtype, g.j, torch.float32), 3.0),
    )


def full(g: Base) -> Base:
    """More operands, made where a case wants them."""
    g.one = g.call(aten.full.default, [], 5)  # type: ignore[attr-defined]
    g.q2 = g.call(aten.full.default, [ROWS, 2], 3.0)  # type: ignore[attr-defined]
    positions = g.call(aten.to.dtype, g.j, torch.float32)
    g.half = g.call(aten.gt.Scalar, positions, 2.5)  # type: ignore[attr-defined]
    g.lowest = g.call(aten.full.default, [], LOW)  # type: ignore[attr-defined]
    noise = g.input("noise", torch.randn(ROWS, COLUMNS))
    g.scores = g.call(aten.add.Tensor, noise, g.x)  # type: ignore[attr-defined]
    return g


@pytest.mark.parametrize("op", CASES, ids=str)
def test_every_op_with_a_case_has_a_rule(op: object) -> None:
    assert op in TABLE


def is_read(op: object) -> bool:
    """An overload that takes and gives tensors."""
    schema = op._schema  # type: ignore[attr-defined]
    is_out = any(a.is_out for a in schema.arguments)
    return not is_out and [str(r.type) for r in schema.returns] == ["Tensor"]


TABLE = {**ARITHMETIC, **MOVING, **NUMBERS}
OPS = [op for op in TABLE if is_read(op) and op is not aten.baddbmm.default]


@pytest.mark.parametrize("op", OPS, ids=str)
def test_every_op_is_read_as_torch_computes_it(op: object) -> None:
    assert op in CASES, f"{op} has a rule and no case"
    for case in CASES[op]:
        graph = full(Base())
        graph.assert_read(case(graph))


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.0])
def test_baddbmm_is_what_it_adds_and_its_product(beta: float) -> None:
    graph = MaskGraph()
    a, b = graph.input("a", torch.randn(2, 5, 3)), graph.input("b", torch.randn(2, 3, 7))
    more = graph.weight("more", torch.randn(1, 5, 7))
    node = graph.call(aten.baddbmm.default, more, a, b, beta=beta, alpha=0.25)
    element = graph.read(node)
    (product,) = (r for r in ia.reads(element) if r.tensor == node.name + PRODUCT)
    assert (beta == 0.0) == (element == product)
    # With the product known, the element is the value.
    known = 0.25 * graph.values[a] @ graph.values[b]
    named = graph.input("known", known)
    swapped = _renamed(element, product.tensor, named.name)
    torch.testing.assert_close(
        graph.computed(swapped, (2, 5, 7)), graph.values[node].double(), rtol=1e-5, atol=1e-6
    )


def _renamed(e: ia.Expr, old: str, new: str) -> ia.Expr:
    if isinstance(e, ia.Read):
        return ia.Read(new if e.tensor == old else e.tensor, e.indices, e.kind)
    if isinstance(e, ia.Call):
        return ia.Call(e.op, tuple(_renamed(a, old, new) for a in e.args))
    return e


OPAQUE: dict[str, Case] = {
    # Each is close to something that is read.
    "rsub with alpha": lambda g: g.call(aten.rsub.Scalar, g.j, 1, 2),
    "add with alpha": lambda g: g.call(aten.add.Tensor, g.i, g.j, alpha=2),
    "sub with alpha": lambda g: g.call(aten.sub.Tensor, g.i, g.j, alpha=3),
    "half steps": lambda g: g.call(aten.arange.start_step, 0.0, 3.0, 0.5),
    "from a half": lambda g: g.call(aten.arange.start, 0.5, 5),
    "truncated": lambda g: g.call(
        aten.div.Tensor_mode, g.call(aten.sub.Tensor, g.i, g.j), 3, rounding_mode="trunc"
    ),
    "active dropout": lambda g: g.call(aten.dropout.default, g.x, 0.5, True),
    "a bound of scores": lambda g: g.call(aten.clamp.default, g.scores, -1.0, 1.0),
    "positions in bfloat16": lambda g: g.call(
        aten.to.dtype, g.call(aten.to.dtype, g.j, torch.float32), torch.bfloat16
    ),
    "a cut across axes": lambda g: g.call(aten.view.default, g.q4, [4, 3]),
    "a product of indices": lambda g: g.call(aten.mul.Tensor, g.i, g.j),
    "bits of numbers": lambda g: g.call(aten.bitwise_and.Tensor, g.i, g.j),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_what_is_not_read_is_an_element_of_itself(name: str) -> None:
    graph = full(Base())
    graph.q4 = graph.call(aten.view.default, graph.call(aten.arange.default, 12), [3, 4])  # type: ignore[attr-defined]
    node = OPAQUE[name](graph)
    assert {read.tensor for read in ia.reads(graph.read(node))} == {node.name}


@pytest.mark.parametrize(
    ("cast", "is_known"), [(torch.bool, True), (torch.int64, False), (torch.float64, True)]
)
def test_minus_infinity_is_cast_where_torch_defines_it(cast: torch.dtype, is_known: bool) -> None:
    graph = full(Base())
    low = graph.call(aten.masked_fill.Scalar, graph.x, graph.d, -math.inf)
    node = graph.call(aten.to.dtype, low, cast)
    if is_known:
        graph.assert_read(node)
    else:
        assert {read.tensor for read in ia.reads(graph.read(node))} == {node.name}


def test_zero_times_infinity_stays_nan() -> None:
    graph = full(Base())
    lower = graph.call(aten.to.dtype, graph.c, torch.float32)
    mask = graph.call(aten.mul.Scalar, graph.call(aten.rsub.Scalar, lower, 1.0), -math.inf)
    element = graph.assert_read(mask)
    assert graph.computed(element, (ROWS, COLUMNS)).isnan().sum() == graph.values[graph.c].sum()


@pytest.mark.parametrize(("rows", "is_known"), [(8, True), (9, False)])
def test_an_op_on_many_cases_is_left_alone(rows: int, is_known: bool) -> None:
    """8 x 8 numbers are computed one by one, 9 x 8 are an element of the node."""
    graph = MaskGraph()
    trees = []
    for count in (rows, 8):
        at = graph.call(aten.arange.default, 12)
        tree = graph.call(aten.full.default, [], 0.0)
        for case in range(1, count):
            before = graph.call(aten.lt.Scalar, at, case)
            tree = graph.call(aten.where.ScalarSelf, before, float(case), tree)
        trees.append(tree)
    node = graph.call(aten.atan2.default, *trees)
    if is_known:
        graph.assert_read(node)
    else:
        assert {read.tensor for read in ia.reads(graph.read(node))} == {node.name}
