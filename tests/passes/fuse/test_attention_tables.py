"""Every op of the tables of fuse_attention, at every place where the pass looks through it.

The graphs are built op by op and no cleanup runs: this pass alone looks through what is there. An
op of a table without a case fails, and so does a case whose op has left its table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_graphs import B, D, H, S, Site, Step, fused
from helpers.run_graph import apply, assert_close, run
from torch import Tensor, fx

from graphopt.ops import attention
from graphopt.passes.fuse.attention import lookalikes as lookalikes
from graphopt.passes.fuse.attention import operands as operands
from graphopt.passes.fuse.fuse_attention import SOFTMAX
from graphopt.passes.fuse.walk import CASTS

aten = torch.ops.aten


def _cast(op: Any) -> Step:
    """A cast to the same dtype."""

    def step(site: Site, x: fx.Node) -> fx.Node:
        if op in (aten.to.other, aten.type_as.default):
            return site.call(op, x, site.weight("other", torch.zeros(2)))
        if op in (aten.to.dtype_layout, aten._to_copy.default):
            return site.call(op, x, dtype=torch.float32)
        return site.call(op, x, torch.float32)

    return step


def _plain(op: Any) -> Step:
    return lambda site, x: site.call(op, x)


def _view(op: Any) -> Step:
    return lambda site, x: site.call(op, x, list(site.values[x].shape))


THROUGH: dict[object, Step] = {
    **{op: _cast(op) for op in CASTS},
    **{op: _plain(op) for op in operands.COPIES},
    **{op: _view(op) for op in operands.VIEWS},
}
EXPECTED = {
    *(aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout),
    *(aten.to.other, aten.type_as.default),
    *(aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default),
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default),
}


def test_the_tables_hold_the_ops_that_have_cases() -> None:
    assert set(THROUGH) == EXPECTED


@pytest.mark.parametrize("op", dict.fromkeys(sorted(EXPECTED, key=str)), ids=str)
@pytest.mark.parametrize("place", ["q", "k", "v", "keys", "scores", "weights"])
def test_what_changes_nothing_is_looked_through(op: Any, place: str) -> None:
    if op in operands.VIEWS and place in ("q", "k", "v", "keys"):
        pytest.skip("a view of an operand is an operand")
    node = fused(Site(**{place: THROUGH[op]}).finish())
    assert node is not None
    # What stands on an operand is no operand: the inputs themselves are.
    if place not in ("scores", "weights"):
        assert [str(arg) for arg in node.args[:3]] == ["q", "k", "v"]


@pytest.mark.parametrize(
    "op", dict.fromkeys((aten.softmax.int, aten._softmax.default, *SOFTMAX)), ids=str
)
def test_every_softmax(op: Any) -> None:
    assert op in SOFTMAX
    node = fused(Site().finish(softmax=op))
    assert node is not None
    assert node.kwargs["scale"] == 1.0


def test_a_safe_softmax() -> None:
    """Rows of minus infinity alone give zeros."""
    hidden = torch.zeros(S, S, dtype=torch.bool)
    hidden[2] = True

    def filled(site: Site, x: fx.Node) -> fx.Node:
        return site.call(aten.masked_fill.Scalar, x, site.weight("hidden", hidden), -torch.inf)

    node = fused(Site(scores=filled).finish(softmax=aten._safe_softmax.default))
    assert node is not None


MULTIPLIED = [aten.matmul.default, aten.einsum.default, aten.bmm.default, aten.baddbmm.default]


@pytest.mark.parametrize("op", dict.fromkeys((*operands.PRODUCTS, *MULTIPLIED)), ids=str)
def test_every_product(op: Any) -> None:
    assert op in operands.PRODUCTS
    site = Site()
    site.folded = op in (aten.bmm.default, aten.baddbmm.default)
    if op is aten.baddbmm.default:
        # Never the product with the values, whose sum is no part of the op.
        site.product = lambda _, a, b, make=site.product: make(  # type: ignore[method-assign]
            op if site.values[b].shape[-1] == S else aten.bmm.default, a, b
        )
    node = fused(site.finish(product=op))
    assert node is not None


SCALES: dict[object, float] = {
    aten.mul.Tensor: 0.5,
    aten.mul.Scalar: 0.5,
    aten.div.Tensor: 2.0,
    aten.div.Scalar: 2.0,
}


@pytest.mark.parametrize("op", dict.fromkeys((*operands._SCALE, *SCALES)), ids=str)
@pytest.mark.parametrize("place", ["q", "k", "keys", "scores"])
def test_a_number_anywhere_is_the_scale(op: Any, place: str) -> None:
    assert op in operands._SCALE
    node = fused(Site(**{place: lambda site, x: site.call(op, x, SCALES[op])}).finish())
    assert node is not None
    assert node.kwargs["scale"] == 0.5
    if place != "scores":
        assert [str(arg) for arg in node.args[:3]] == ["q", "k", "v"]


def test_scales_multiply_and_a_scale_of_values_is_none() -> None:
    half: Step = lambda site, x: site.call(aten.mul.Scalar, x, 0.5)  # noqa: E731
    node = fused(Site(q=half, k=half, scores=half, v=half).finish())
    assert node is not None
    assert node.kwargs["scale"] == 0.125
    assert [str(arg) for arg in node.args[:2]] == ["q", "k"]
    assert str(node.args[2]) != "v"


def test_a_scale_of_zero_is_not_taken_out() -> None:
    node = fused(Site(q=lambda site, x: site.call(aten.mul.Scalar, x, 0.0)).finish())
    assert node is not None
    assert str(node.args[0]) != "q"


def test_a_scale_that_widens_stays() -> None:
    """The product of a half-precision operand and a number of another dtype is no plain factor."""
    site = Site()
    q, k, v = (site.input(n, torch.randn(B, H, S, D).bfloat16().float()) for n in "qkv")
    low = site.call(aten.to.dtype, q, torch.bfloat16)
    scaled = site.call(aten.mul.Tensor, low, site.weight("s", torch.tensor([0.3])))
    scores = site.call(aten.matmul.default, scaled, site.call(aten.transpose.int, k, 2, 3))
    weights = site.call(aten.softmax.int, scores, -1)
    site.returns(site.call(aten.matmul.default, weights, v))
    node = fused(site)
    assert node is None or str(node.args[0]) != "q"


@pytest.mark.parametrize("copy", [None, *operands.COPIES], ids=str)
@pytest.mark.parametrize(
    "view", dict.fromkeys((*operands.VIEWS, *operands.FLATTEN, aten.flatten.using_ints))
)
def test_repeated_heads(view: Any, copy: Any) -> None:
    """[B, G, S, D] -> [B, G, 1, S, D] -> [B, G, 2, S, D] -> [B, 2 * G, S, D]"""
    site = Site()
    q = site.input("q", torch.randn(B, 6, S, D))
    k, v = (site.input(name, torch.randn(B, 3, S, D)) for name in "kv")

    def repeated(x: fx.Node) -> fx.Node:
        x = site.call(aten.unsqueeze.default, x, 2)
        x = site.call(aten.expand.default, x, [B, 3, 2, S, D])
        if copy is not None:
            x = site.call(copy, x)
        if view in operands.FLATTEN:
            return site.call(view, x, 1, 2)
        if view is not aten.reshape.default and not site.values[x].is_contiguous():
            # Only a layout without gaps can be viewed.
            x = site.call(aten.clone.default, x, memory_format=torch.contiguous_format)
        return site.call(view, x, [B, 6, S, D])

    keys = site.call(aten.transpose.int, repeated(k), 2, 3)
    weights = site.call(aten.softmax.int, site.call(aten.matmul.default, q, keys), -1)
    site.returns(site.call(aten.matmul.default, weights, repeated(v)))
    node = fused(site)
    assert node is not None
    assert [str(arg) for arg in node.args[:3]] == ["q", "k", "v"]


def test_heads_that_are_repeated_in_another_order_stay() -> None:
    site = Site()
    q = site.input("q", torch.randn(B, 6, S, D))
    k, v = (site.input(name, torch.randn(B, 3, S, D)) for name in "kv")
    k, v = (site.call(aten.repeat.default, x, [1, 2, 1, 1]) for x in (k, v))
    keys = site.call(aten.transpose.int, k, 2, 3)
    weights = site.call(aten.softmax.int, site.call(aten.matmul.default, q, keys), -1)
    site.returns(site.call(aten.matmul.default, weights, v))
    node = fused(site)
    assert node is not None
    assert str(node.args[1]) != "k"


def _normalised(make: Callable[[Site, fx.Node], fx.Node]) -> list[str]:
    """Codes for scores that `make` turns into weights."""
    site = Site()
    q, k, v = (site.input(name, torch.randn(B, H, S, D)) for name in "qkv")
    scores = site.call(aten.matmul.default, q, site.call(aten.transpose.int, k, 2, 3))
    site.returns(site.call(aten.matmul.default, make(site, scores), v))
    report = apply(site.graph, "fuse_attention")
    assert not site.graph.calls(attention.SPEC.overload)
    return [rejection.code for rejection in report.rejections("fuse_attention")]


@pytest.mark.parametrize(
    "op", dict.fromkeys((*lookalikes._EXPONENTIALS, aten.exp.default, aten.exp2.default))
)
def test_every_exponential_is_named(op: Any) -> None:
    def by_hand(g: Site, x: fx.Node) -> fx.Node:
        powers = g.call(op, x)
        total = g.call(aten.sum.dim_IntList, powers, [-1], True)
        return g.call(aten.div.Tensor, powers, total)

    assert _normalised(by_hand) == ["softmax-by-hand"]


@pytest.mark.parametrize(
    "op", dict.fromkeys((*lookalikes._OTHERS, aten.sigmoid.default, aten.log_softmax.int))
)
def test_every_other_normaliser_is_named(op: Any) -> None:
    rest = (-1,) if op is aten.log_softmax.int else ()
    assert _normalised(lambda g, x: g.call(op, x, *rest)) == ["not-softmax"]


TEN = torch.tensor(10.0)
STEPS: dict[object, Step] = {
    **THROUGH,
    aten.add.Tensor: lambda g, x: g.call(aten.add.Tensor, x, g.weight("ten", TEN)),
    aten.sub.Tensor: lambda g, x: g.call(aten.sub.Tensor, x, g.weight("ten", TEN)),
    aten.mul.Tensor: lambda g, x: g.call(aten.mul.Tensor, x, 0.5),
    aten.div.Tensor: lambda g, x: g.call(aten.div.Tensor, x, 2.0),
    aten.clamp.default: lambda g, x: g.call(aten.clamp.default, x, -9.0, 9.0),
    aten.tanh.default: lambda g, x: g.call(aten.tanh.default, x),
    aten.masked_fill.Scalar: lambda g, x: g.call(
        aten.masked_fill.Scalar, x, g.weight("on", torch.eye(S).bool()), -1e9
    ),
    aten.where.ScalarOther: lambda g, x: g.call(
        aten.where.ScalarOther, g.weight("on", torch.eye(S).bool()), x, -1e9
    ),
}


@pytest.mark.parametrize("op", dict.fromkeys((*lookalikes._STEPS, *STEPS)), ids=str)
def test_a_lookalike_is_found_behind_every_step(op: Any) -> None:
    assert op in lookalikes._STEPS
    assert _normalised(lambda g, x: g.call(aten.sigmoid.default, STEPS[op](g, x))) == [
        "not-softmax"
    ]


def test_a_sigmoid_that_is_no_attention_is_no_candidate() -> None:
    """A gate in front of one product, behind none; and behind one, in front of none."""
    site = Site()
    x, w = site.input("x", torch.randn(B, S, D)), site.input("w", torch.randn(B, D, D))
    gate = site.call(aten.sigmoid.default, x)
    after = site.call(aten.matmul.default, gate, w)
    site.returns(site.call(aten.sigmoid.default, after))
    assert not apply(site.graph, "fuse_attention").rejections("fuse_attention")


DIFFERENT: dict[str, tuple[str, Step]] = {
    "another axis": (
        "softmax-axis",
        lambda g, x: g.call(aten.softmax.int, x, 2),
    ),
    "active dropout": (
        "dropout-on",
        lambda g, x: g.call(aten.dropout.default, g.call(aten.softmax.int, x, -1), 0.5, True),
    ),
    "moved queries": (
        "no-value-product",
        lambda g, x: g.call(aten.flip.default, g.call(aten.softmax.int, x, -1), [2]),
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_is_not_this_softmax_is_refused(name: str) -> None:
    code, step = DIFFERENT[name]
    assert _normalised(step) == [code]


def test_a_row_maximum_is_nothing_to_the_softmax() -> None:
    for dim in ([-1], [3]):
        node = fused(
            Site(
                scores=lambda g, x, dim=dim: g.call(
                    aten.sub.Tensor, x, g.call(aten.amax.default, x, dim, True)
                )
            ).finish()
        )
        assert node is not None
        assert node.args[3] is None


def test_the_maximum_of_all_queries_is_a_bias() -> None:
    def moved(g: Site, x: fx.Node) -> fx.Node:
        return g.call(aten.sub.Tensor, x, g.call(aten.amax.default, x, [2], True))

    node = fused(Site(scores=moved).finish())
    assert node is not None
    assert node.kwargs["bias"] == "-aux0[b, h, 0, k]" or "aux0" in str(node.kwargs["bias"])


def test_key_heads_that_a_symbol_counts() -> None:
    """Queries with heads of a symbolic number, keys and values with one: broadcast by torch."""
    from graphopt.capture import capture

    class Heads(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.transpose(2, 3)).softmax(-1) @ v

    given = [torch.randn(B, heads, S, D) for heads in (6, 1, 1)]
    graph = capture(Heads().eval(), tuple(given), dynamic={"q": {1: "heads"}})
    apply(graph, "fuse_attention")
    assert len(graph.calls(attention.SPEC.overload)) == 1
    fresh = [torch.randn(B, heads, S, D) for heads in (4, 1, 1)]
    assert_close(run(graph, *fresh), Heads()(*fresh), 1e-5)
