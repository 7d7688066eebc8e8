"""Attention written by hand, op by op, without a model and without cleanup."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers.op_graph import OpGraph
from helpers.run_graph import apply, assert_close, run
from torch import fx

from graphopt.ops import attention

aten = torch.ops.aten
B, H, S, D = 2, 3, 5, 8
Step = Callable[["Site", fx.Node], fx.Node]


class Site(OpGraph):
    """softmax(q @ k^T * scale, -1) @ v, with a step at one place or at several."""

    def __init__(self, **steps: Step) -> None:
        super().__init__()
        self.steps = steps
        torch.manual_seed(0)
        self.folded = False

    def at(self, place: str, node: fx.Node) -> fx.Node:
        """`node` after the step of this place."""
        return self.steps[place](self, node) if place in self.steps else node

    def finish(self, softmax: Any = aten.softmax.int, product: Any = aten.matmul.default) -> Site:
        """Build it."""
        q, k, v = (self.input(name, torch.randn(self.shape)) for name in "qkv")
        q, k, v = self.at("q", q), self.at("k", k), self.at("v", v)
        last = len(self.shape) - 1
        keys = self.at("keys", self.call(aten.transpose.int, k, last - 1, last))
        scores = self.at("scores", self.product(product, q, keys))
        rest = () if softmax is aten.softmax.int or softmax is aten._safe_softmax.default else (0,)
        weights = self.at("weights", self.call(softmax, scores, -1, *map(bool, rest)))
        self.returns(self.product(product, weights, v))
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """Of q, k and v."""
        return (B * H, S, D) if self.folded else (B, H, S, D)

    def product(self, op: Any, a: fx.Node, b: fx.Node) -> fx.Node:
        """a @ b."""
        if op is aten.einsum.default:
            return self.call(op, "bhij,bhjk->bhik", [a, b])
        if op is aten.baddbmm.default:
            more = self.weight(f"more{len(self.graph.weights)}", torch.zeros(1, 1, 1))
            return self.call(op, more, a, b, beta=0)
        return self.call(op, a, b)


def fused(site: Site) -> fx.Node | None:
    """The attention op that the pass makes of it; values stay what they were."""
    before = run(site.graph, *site.inputs)
    apply(site.graph, "fuse_attention")
    assert_close(run(site.graph, *site.inputs), before, 1e-5)
    calls = site.graph.calls(attention.SPEC.overload)
    assert len(calls) <= 1
    return calls[0] if calls else None
