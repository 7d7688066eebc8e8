"""Every op of the tables of fuse_norm, fuse_mlp and fuse_rope: built op by op, one spelling each.

An op of a table without a case fails, and so does a case whose op has left its table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.op_graph import OpGraph
from helpers.run_graph import apply, assert_close, run
from torch import fx

from graphopt.passes.fuse import fuse_norm, gated_activation, walk
from graphopt.passes.fuse.norm import factor as norm_factor
from graphopt.passes.fuse.rope import spelling as rope_spelling

aten = torch.ops.aten
Make = Callable[[OpGraph, fx.Node], fx.Node]
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))


def fused(make: Make, name: str, **inputs: torch.Tensor) -> tuple[list[str], list[str]]:
    """(ops of ours that pass `name` makes, codes it refuses with); values stay what they were."""
    g = OpGraph()
    nodes = [g.input(key, value) for key, value in (inputs or {"x": X}).items()]
    graph = g.returns(make(g, nodes[0]))
    before = run(graph, *g.inputs)
    report = apply(graph, name)
    assert_close(run(graph, *g.inputs), before, 1e-5)
    made = [op for op in graph.op_counts() if op.startswith("graphopt.")]
    return made, [rejection.code for rejection in report.rejections(name)]


# --- norms ---------------------------------------------------------------------------------------


def mean_square(g: OpGraph, x: fx.Node, square: Make) -> fx.Node:
    return g.call(aten.mean.dim, square(g, x), [-1], True)


def squared(g: OpGraph, x: fx.Node) -> fx.Node:
    return g.call(aten.pow.Tensor_Scalar, x, 2)


SQUARES: dict[object, Make] = {
    aten.pow.Tensor_Scalar: squared,
    aten.mul.Tensor: lambda g, x: g.call(aten.mul.Tensor, x, x),
    aten.square.default: lambda g, x: g.call(aten.square.default, x),
}


@pytest.mark.parametrize("op", SQUARES, ids=str)
def test_every_square_under_a_root(op: Any) -> None:
    def norm(g: OpGraph, x: fx.Node) -> fx.Node:
        total = g.call(aten.add.Tensor, mean_square(g, x, SQUARES[op]), 1e-5)
        return g.call(aten.mul.Tensor, x, g.call(aten.rsqrt.default, total))

    assert fused(norm, "fuse_norm") == (["graphopt.rms_norm"], [])


@pytest.mark.parametrize(
    "op", dict.fromkeys((*norm_factor._ADDS, aten.add.Tensor, aten.add.Scalar)), ids=str
)
def test_every_sum_under_a_root(op: Any) -> None:
    assert op in norm_factor._ADDS

    def norm(g: OpGraph, x: fx.Node) -> fx.Node:
        total = g.call(op, mean_square(g, x, squared), 1e-5)
        return g.call(aten.div.Tensor, x, g.call(aten.sqrt.default, total))

    assert fused(norm, "fuse_norm") == (["graphopt.rms_norm"], [])


def _root(root: Make, product: Any) -> Make:
    def norm(g: OpGraph, x: fx.Node) -> fx.Node:
        total = g.call(aten.add.Tensor, mean_square(g, x, squared), 1e-5)
        return g.call(product, x, root(g, total))

    return norm


def _power(exponent: float) -> Make:
    return lambda g, x: g.call(aten.pow.Tensor_Scalar, x, exponent)


def _root_of(op: Any) -> Make:
    return lambda g, x: g.call(op, x)


ROOTS: dict[str, tuple[Make, Any]] = {
    "aten.rsqrt.default": (_root_of(aten.rsqrt.default), aten.mul.Tensor),
    "aten.sqrt.default": (_root_of(aten.sqrt.default), aten.div.Tensor),
    "a power of a half": (_power(0.5), aten.div.Tensor),
    "a power of minus a half": (_power(-0.5), aten.mul.Tensor),
    "the reciprocal of a root": (
        lambda g, x: g.call(aten.reciprocal.default, g.call(aten.sqrt.default, x)),
        aten.mul.Tensor,
    ),
}


@pytest.mark.parametrize("name", dict.fromkeys((*ROOTS, *map(str, norm_factor._ROOTS))))
def test_every_root(name: str) -> None:
    assert not name.startswith("aten") or name in map(str, norm_factor._ROOTS)
    assert fused(_root(*ROOTS[name]), "fuse_norm") == (["graphopt.rms_norm"], [])


@pytest.mark.parametrize(
    ("root", "product", "code"),
    [
        (_root_of(aten.rsqrt.default), aten.div.Tensor, "factor-used-elsewhere"),
        (_root_of(aten.sqrt.default), aten.mul.Tensor, "factor-used-elsewhere"),
        (_power(0.5), aten.mul.Tensor, "factor-used-elsewhere"),
        (_power(-0.5), aten.div.Tensor, "factor-used-elsewhere"),
        (_power(-1.0), aten.mul.Tensor, "other-root"),
    ],
)
def test_a_root_that_is_applied_the_other_way_round(root: Make, product: Any, code: str) -> None:
    assert fused(_root(root, product), "fuse_norm") == ([], [code])


def test_the_root_divided_by_x_is_no_norm() -> None:
    def norm(g: OpGraph, x: fx.Node) -> fx.Node:
        total = g.call(aten.add.Tensor, mean_square(g, x, squared), 1e-5)
        return g.call(aten.div.Tensor, g.call(aten.sqrt.default, total), x)

    assert fused(norm, "fuse_norm") == ([], ["factor-used-elsewhere"])


VARIANCES: dict[object, tuple[Any, ...]] = {
    aten.var.correction: ([-1],),
    aten.var.dim: ([-1], False, True),
}


@pytest.mark.parametrize("op", dict.fromkeys((*norm_factor._VARIANCES, *VARIANCES)), ids=str)
def test_every_variance(op: Any) -> None:
    assert op in norm_factor._VARIANCES
    named = {"correction": 0, "keepdim": True} if op is aten.var.correction else {}

    def norm(g: OpGraph, x: fx.Node) -> fx.Node:
        centred = g.call(aten.sub.Tensor, x, g.call(aten.mean.dim, x, [-1], True))
        total = g.call(aten.add.Tensor, g.call(op, x, *VARIANCES[op], **named), 1e-5)
        return g.call(aten.mul.Tensor, centred, g.call(aten.rsqrt.default, total))

    assert fused(norm, "fuse_norm") == (["graphopt.layer_norm"], [])


@pytest.mark.parametrize("op", fuse_norm._NORMS, ids=str)
def test_every_norm_of_torch(op: Any) -> None:
    made = "graphopt.rms_norm" if op is aten.rms_norm.default else "graphopt.layer_norm"

    def norm(g: OpGraph, x: fx.Node) -> fx.Node:
        weight = g.weight("w", torch.rand(8))
        if op is aten.native_layer_norm.default:
            pytest.skip("it returns three tensors; tests of whole models have it")
        return g.call(op, x, [8], weight, eps=0.25)

    assert fused(norm, "fuse_norm") == ([made], [])


@pytest.mark.parametrize("op", walk.CASTS, ids=str)
@pytest.mark.parametrize("low", fuse_norm._HALVES, ids=str)
def test_every_cast_around_a_norm(op: Any, low: torch.dtype) -> None:
    """x.float() -> norm -> back, from each half-precision type."""

    def cast(g: OpGraph, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        if op in (aten.to.other, aten.type_as.default):
            return g.call(op, x, g.weight(f"like_{dtype}".replace(".", "_"), X.to(dtype)))
        if op in (aten.to.dtype_layout, aten._to_copy.default):
            return g.call(op, x, dtype=dtype)
        return g.call(op, x, dtype)

    g = OpGraph()
    wide = cast(g, g.input("x", X.to(low)), torch.float32)
    total = g.call(aten.add.Tensor, mean_square(g, wide, squared), 1e-5)
    scaled = g.call(aten.mul.Tensor, wide, g.call(aten.rsqrt.default, total))
    graph = g.returns(cast(g, scaled, low))
    apply(graph, "fuse_norm", "dead_code")
    assert graph.op_counts() == {"graphopt.rms_norm": 1}


OF_SQUARES: dict[object, tuple[Any, ...]] = {
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor), (0.5,)),
    **dict.fromkeys((aten.mul.Tensor, aten.div.Tensor), (2.0,)),
    **dict.fromkeys((aten.abs.default, aten.sqrt.default), ()),
    aten.clamp.default: (1e-6,),
    aten.maximum.default: (torch.tensor(1e-6),),
}


@pytest.mark.parametrize("op", dict.fromkeys((*norm_factor._POINTWISE, *OF_SQUARES)), ids=str)
def test_a_norm_is_a_candidate_behind_every_op_on_the_mean(op: Any) -> None:
    """Refused by name, not passed over."""
    assert op in norm_factor._POINTWISE
    g = OpGraph()
    x = g.input("x", X)
    args = [g.weight("a", a) if isinstance(a, torch.Tensor) else a for a in OF_SQUARES[op]]
    changed = g.call(op, mean_square(g, x, squared), *args)
    graph = g.returns(g.call(aten.mul.Tensor, x, g.call(aten.log.default, changed)))
    rejected = apply(graph, "fuse_norm").rejections("fuse_norm")
    # A logarithm of a root has no candidate of its own: the root is one.
    assert len(rejected) == 1


@pytest.mark.parametrize(
    "op", dict.fromkeys((*norm_factor._STATISTICS, aten.mean.dim, aten.sum.dim_IntList))
)
def test_every_statistic_of_squares_is_a_candidate(op: Any) -> None:
    assert op in norm_factor._STATISTICS
    g = OpGraph()
    x = g.input("x", X)
    total = g.call(op, squared(g, x), [-1], True)
    graph = g.returns(g.call(aten.mul.Tensor, x, g.call(aten.reciprocal.default, total)))
    assert [r.code for r in apply(graph, "fuse_norm").rejections("fuse_norm")] == ["other-root"]


# --- gated activations ---------------------------------------------------------------------------


def gated(activation: Make) -> Make:
    """activation(gate) * up"""

    def make(g: OpGraph, x: fx.Node) -> fx.Node:
        up = g.call(aten.cos.default, x)
        return g.call(aten.mul.Tensor, activation(g, x), up)

    return make


HALVED: dict[object, float] = {
    aten.mul.Tensor: 0.5,
    aten.mul.Scalar: 0.5,
    aten.div.Tensor: 2.0,
    aten.div.Scalar: 2.0,
}


@pytest.mark.parametrize("op", dict.fromkeys((*gated_activation._MULS, *HALVED)), ids=str)
def test_every_product_with_a_number(op: Any) -> None:
    assert op in gated_activation._MULS
    is_division = op in (aten.div.Tensor, aten.div.Scalar)

    def gelu(g: OpGraph, x: fx.Node) -> fx.Node:
        inner = g.call(op, x, math.sqrt(2) if is_division else math.sqrt(0.5))
        shifted = g.call(aten.add.Tensor, g.call(aten.erf.default, inner), 1)
        return g.call(aten.mul.Tensor, g.call(op, x, HALVED[op]), shifted)

    assert fused(gated(gelu), "fuse_mlp") == (["graphopt.geglu"], [])


@pytest.mark.parametrize(
    "op", dict.fromkeys((*gated_activation._ADDS, aten.add.Tensor, aten.add.Scalar)), ids=str
)
def test_every_sum_with_one(op: Any) -> None:
    assert op in gated_activation._ADDS

    def gelu(g: OpGraph, x: fx.Node) -> fx.Node:
        inner = g.call(aten.mul.Tensor, x, math.sqrt(0.5))
        shifted = g.call(op, g.call(aten.erf.default, inner), 1)
        return g.call(aten.mul.Tensor, g.call(aten.mul.Tensor, x, 0.5), shifted)

    assert fused(gated(gelu), "fuse_mlp") == (["graphopt.geglu"], [])


@pytest.mark.parametrize("op", gated_activation._SUBTRACTIONS, ids=str)
def test_a_difference_with_one_is_named(op: Any) -> None:
    def wrong(g: OpGraph, x: fx.Node) -> fx.Node:
        inner = g.call(aten.mul.Tensor, x, math.sqrt(0.5))
        shifted = g.call(op, g.call(aten.erf.default, inner), 1)
        return g.call(aten.mul.Tensor, g.call(aten.mul.Tensor, x, 0.5), shifted)

    assert fused(gated(wrong), "fuse_mlp") == ([], ["not-gelu"])


@pytest.mark.parametrize("division", gated_activation._DIVISIONS, ids=str)
@pytest.mark.parametrize("power", gated_activation._EXPONENTIALS, ids=str)
def test_a_sigmoid_of_exponentials_is_named(division: Any, power: Any) -> None:
    def by_hand(g: OpGraph, x: fx.Node) -> fx.Node:
        below = g.call(aten.add.Tensor, g.call(power, g.call(aten.neg.default, x)), 1)
        if division is aten.div.Tensor:
            return g.call(division, x, below)
        return g.call(aten.mul.Tensor, x, g.call(division, below))

    assert fused(gated(by_hand), "fuse_mlp") == ([], ["sigmoid-by-hand"])


def test_the_tables_of_activations_are_whole() -> None:
    assert set(gated_activation._SUBTRACTIONS) == {
        aten.sub.Tensor,
        aten.sub.Scalar,
        aten.rsub.Scalar,
    }
    assert set(gated_activation._DIVISIONS) == {aten.div.Tensor, aten.reciprocal.default}
    assert set(gated_activation._EXPONENTIALS) == {aten.exp.default, aten.exp2.default}
    assert set(fuse_norm._NORMS) == {
        aten.layer_norm.default,
        aten.native_layer_norm.default,
        aten.rms_norm.default,
    }
    assert set(fuse_norm._HALVES) == {torch.bfloat16, torch.float16}


@pytest.mark.parametrize("power", [2, 3])
def test_powers_are_products(power: int) -> None:
    """sqrt(2 / pi) * (x + 0.044715 * x^3), and x * (1 + 0.044715 * x^2)."""

    def gelu(g: OpGraph, x: fx.Node) -> fx.Node:
        cubic = g.call(aten.mul.Tensor, g.call(aten.pow.Tensor_Scalar, x, power), 0.044715)
        total = g.call(aten.add.Tensor, cubic, x if power == 3 else 1)
        if power == 2:
            total = g.call(aten.mul.Tensor, total, x)
        inner = g.call(aten.mul.Tensor, total, math.sqrt(2 / math.pi))
        shifted = g.call(aten.add.Tensor, g.call(aten.tanh.default, inner), 1)
        return g.call(aten.mul.Tensor, g.call(aten.mul.Tensor, x, 0.5), shifted)

    assert fused(gated(gelu), "fuse_mlp") == (["graphopt.geglu"], [])


# --- rotations -----------------------------------------------------------------------------------

HEADS = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(2))
RESHAPES: dict[object, tuple[Any, ...]] = {
    aten.flatten.using_ints: (-2, -1),
    aten.reshape.default: ([2, 3, 5, 8],),
    aten.view.default: ([2, 3, 5, 8],),
    aten._unsafe_view.default: ([2, 3, 5, 8],),
}


def _tables(g: OpGraph, width: int) -> tuple[fx.Node, fx.Node]:
    angles = torch.arange(5.0)[:, None] * torch.linspace(0.1, 1, width)
    return g.weight("cos", angles.cos()), g.weight("sin", angles.sin())


@pytest.mark.parametrize("op", RESHAPES, ids=str)
def test_every_reshape_of_pairs(op: Any) -> None:
    """stack([-x[1::2], x[::2]], -1) -> [.., 8]"""
    assert op in rope_spelling._RESHAPES

    def turned(g: OpGraph, x: fx.Node) -> fx.Node:
        cos, sin = _tables(g, 8)
        even = g.call(aten.slice.Tensor, x, -1, 0, 8, 2)
        odd = g.call(aten.slice.Tensor, x, -1, 1, 8, 2)
        stacked = g.call(aten.stack.default, [g.call(aten.neg.default, odd), even], -1)
        joined = g.call(op, stacked, *RESHAPES[op])
        by_cos, by_sin = g.call(aten.mul.Tensor, x, cos), g.call(aten.mul.Tensor, joined, sin)
        return g.call(aten.add.Tensor, by_cos, by_sin)

    assert fused(turned, "fuse_rope", x=HEADS) == (["graphopt.rope"], [])


def test_the_tables_of_rotations_are_whole() -> None:
    assert set(rope_spelling._RESHAPES) == {*RESHAPES, aten.unflatten.int}
    assert set(rope_spelling._SUMS) == {aten.add.Tensor, aten.sub.Tensor}


@pytest.mark.parametrize("split", walk._SPLITS, ids=str)
def test_every_split_into_halves(split: Any) -> None:
    how = {
        aten.chunk.default: (2, -1),
        aten.split.Tensor: (4, -1),
        aten.split_with_sizes.default: ([4, 4], -1),
    }
    assert set(how) == set(walk._SPLITS)

    def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = split(x, *how[split])
        return x * cos + torch.cat([-second, first], -1) * sin

    class Rotation(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            angles = torch.arange(5.0)[:, None] * torch.linspace(0.1, 1, 4).repeat(2)
            return turned(x, angles.cos(), angles.sin())

    from graphopt.capture import capture

    graph = capture(Rotation().eval(), HEADS)
    before = run(graph, HEADS)
    apply(graph, "fuse_rope")
    assert_close(run(graph, HEADS), before)
    assert graph.op_counts()["graphopt.rope"] == 1
