"""Attention that differs from the plain one in one place: what the pass makes of it, or why not."""

from __future__ import annotations

import pytest
import torch
from attention_graphs import B, D, H, S, Site, fused
from helpers.run_graph import apply
from torch import fx

from graphopt.passes.fuse.attention import operands as operands

aten = torch.ops.aten


def test_a_dense_mask_that_hides_where_true() -> None:
    """Filled with a number that only just hides: no bias says what it does."""
    site = Site()
    q, k, v = (site.input(name, torch.randn(B, H, S, D)) for name in "qkv")
    hidden = site.input("hidden", torch.rand(B, 1, S, S) < 0.4)
    scores = site.call(aten.matmul.default, q, site.call(aten.transpose.int, k, 2, 3))
    filled = site.call(aten.masked_fill.Scalar, scores, hidden, -1e4)
    weights = site.call(aten.softmax.int, filled, -1)
    site.returns(site.call(aten.matmul.default, weights, v))
    node = fused(site)
    assert node is not None
    mask = node.args[3]
    assert isinstance(mask, fx.Node)
    assert mask.target is aten.logical_not.default
    assert node.kwargs["hidden"] == "-10000.0"


@pytest.mark.parametrize("place", ["scores", "weights"])
@pytest.mark.parametrize("behind", [0, 1, 2])
def test_rounding_is_seen_however_far_from_the_softmax(place: str, behind: int) -> None:
    def rounded(g: Site, x: fx.Node) -> fx.Node:
        for _ in range(behind):
            x = g.call(aten.alias.default, x)
        x = g.call(aten.to.dtype, g.call(aten.to.dtype, x, torch.float16), torch.float32)
        for _ in range(behind):
            x = g.call(aten.alias.default, x)
        return x

    site = Site(**{place: rounded}).finish()
    (rejection,) = apply(site.graph, "fuse_attention").rejections("fuse_attention")
    assert rejection.code == "rounded-between"


@pytest.mark.parametrize("maximum", [False, True])
def test_sinks_are_a_further_column(maximum: bool) -> None:
    site = Site()
    q, k, v = (site.input(name, torch.randn(B, H, S, D)) for name in "qkv")
    sinks = site.weight("sinks", torch.randn(H))
    column = site.call(
        aten.expand.default, site.call(aten.view.default, sinks, [1, H, 1, 1]), [B, H, S, 1]
    )
    scores = site.call(aten.matmul.default, q, site.call(aten.transpose.int, k, 2, 3))
    both = site.call(aten.cat.default, [scores, column], -1)
    if maximum:
        both = site.call(aten.sub.Tensor, both, site.call(aten.amax.default, both, [-1], True))
    weights = site.call(aten.slice.Tensor, site.call(aten.softmax.int, both, -1), -1, 0, -1)
    site.returns(site.call(aten.matmul.default, weights, v))
    node = fused(site)
    assert node is not None
    assert str(node.args[5]) == "sinks"


EINSUMS: dict[str, tuple[tuple[str, tuple[int, ...], tuple[int, ...]], bool]] = {
    # scores = einsum(equation, q, k) over sizes of q and k; whether it is a product of heads.
    "plain": (("bhid,bhjd->bhij", (B, H, S, D), (B, H, S, D)), True),
    "tokens first": (("bihd,bjhd->bhij", (B, S, H, D), (B, S, H, D)), True),
    "turned": (("bhjd,bhid->bhij", (B, H, S, D), (B, H, S, D)), True),
    "one head of keys": (("bhid,bjd->bhij", (B, H, S, D), (B, S, D)), True),
    "a sum over keys' own": (("bhid,bhjdx->bhij", (B, H, S, D), (B, H, S, D, 2)), False),
    "a sum over queries' own": (("bhidx,bhjd->bhij", (B, H, S, D, 2), (B, H, S, D)), False),
    "no batch of keys": (("bhid,hjd->bhij", (B, H, S, D), (H, S, D)), False),
    "no sum": (("bhid,bhjd->bhijd", (B, H, S, D), (B, H, S, D)), False),
}


@pytest.mark.parametrize("name", EINSUMS)
def test_einsums_of_scores(name: str) -> None:
    (equation, of_q, of_k), is_product = EINSUMS[name]
    site = Site()
    q, k = site.input("q", torch.randn(of_q)), site.input("k", torch.randn(of_k))
    scores = site.call(aten.einsum.default, equation, [q, k])
    assert (operands.read_product(site.graph, scores) is not None) == is_product
    if not is_product:
        return
    of_v = (B, S, D) if len(of_k) == 3 else (B, H, S, D)
    v = site.input("v", torch.randn(of_v))
    weights = site.call(aten.softmax.int, scores, -1)
    values = "bjd" if len(of_v) == 3 else "bhjd"
    site.returns(site.call(aten.einsum.default, f"bhij,{values}->bihd", [weights, v]))
    assert fused(site) is not None


@pytest.mark.parametrize("kv", [(3, 3), (1, 1), (2, 2)])
def test_heads_of_keys_that_fit_or_do_not(kv: tuple[int, int]) -> None:
    """SDPA with repeated heads: taken unrepeated where keys and values agree."""
    site = Site()
    q = site.input("q", torch.randn(B, 6, S, D))
    k, v = (site.input(n, torch.randn(B, g, S, D)) for n, g in zip("kv", kv, strict=True))
    wide = [site.call(aten.repeat_interleave.self_int, x, 6 // kv[0], 1) for x in (k, v)]
    site.returns(site.call(aten.scaled_dot_product_attention.default, q, *wide))
    node = fused(site)
    assert node is not None
    assert [str(arg) for arg in node.args[:3]] == ["q", "k", "v"]


def test_keys_and_values_that_are_repeated_differently_stay_so() -> None:
    site = Site()
    q = site.input("q", torch.randn(B, 6, S, D))
    k, v = site.input("k", torch.randn(B, 3, S, D)), site.input("v", torch.randn(B, 2, S, D))
    wide = [
        site.call(aten.repeat_interleave.self_int, x, times, 1) for x, times in ((k, 2), (v, 3))
    ]
    site.returns(site.call(aten.scaled_dot_product_attention.default, q, *wide))
    node = fused(site)
    assert node is not None
    assert [str(arg) for arg in node.args[1:3]] == [wide[0].name, wide[1].name]
