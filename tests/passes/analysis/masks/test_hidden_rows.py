"""Queries that see nothing get what the model gives them, however its mask is spelled."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers.masked_models import PADDINGS, AllSpelled, Spelling, padded
from helpers.run_graph import CLEANUP, apply

from graphopt.capture import capture
from graphopt.codegen.reference import ReferenceBackend
from graphopt.ir.graph import argument
from graphopt.ops import attention

FORMS = ("filled", "added", "twice", "rows", "bits", "sdpa", "sdpa-added")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_row_of_every_spelling(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # A float64 mask that torch.where makes has float32's limits.
    lows = (-math.inf, max(torch.finfo(dtype).min, torch.finfo(torch.float32).min), -1e4)
    drawn = [Spelling(*parts) for parts in itertools.product(FORMS, lows, (False, True))]
    drawn = [a for a in drawn if a.form != "sdpa" or a.low == -math.inf]
    drawn = [a for a in drawn if a.causal or a.form in ("filled", "added", "sdpa")]
    if dtype != torch.float32:
        drawn = [a for a in drawn if a.causal and a.form in ("filled", "added", "bits")]
    model = AllSpelled(drawn).eval().to(dtype)
    graph = capture(model, padded(2, 9, "right"))
    apply(graph, *CLEANUP, "fuse_attention", "dead_code")
    fused = {node.meta["layer"]: node for node in graph.calls(attention.SPEC.overload)}
    for i, spelling in enumerate(drawn):
        node = fused.get(f"parts.{i}")
        assert node is not None, spelling
        if spelling.form != "rows":
            assert argument(node, "mask") is None, spelling
            assert argument(node, "pad_BT") is not None, spelling
            assert argument(node, "causal") == spelling.causal, spelling
    run = ReferenceBackend().lower(graph)
    limit = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-6}[dtype]
    for where in PADDINGS:
        inputs = padded(3, 12, where)
        with torch.no_grad():
            expected = model(*inputs)
        for spelling, ours, theirs in zip(drawn, run(*inputs), expected, strict=True):
            assert torch.equal(ours.isnan(), theirs.isnan()), (spelling, where)
            error = (ours - theirs).nan_to_num().abs().max()
            assert error <= limit * theirs.nan_to_num().abs().max(), (spelling, where, error)


def test_a_hidden_key_may_win() -> None:
    """Nothing is hidden by -10000 where the scores are larger: no threshold is relied on."""
    drawn = [Spelling(form, -1e4, True) for form in ("filled", "added", "twice", "bits")]
    model = AllSpelled(drawn).eval()
    with torch.no_grad():
        for table in (*model.queries, model.keys):
            table.weight *= 300
    graph = capture(model, padded(2, 9, "right"))
    apply(graph, *CLEANUP, "fuse_attention", "dead_code")
    assert len(graph.calls(attention.SPEC.overload)) == len(drawn)
    inputs = padded(3, 12, "holes")
    with torch.no_grad():
        expected = model(*inputs)
    for ours, theirs in zip(ReferenceBackend().lower(graph)(*inputs), expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()


def test_what_cannot_matter_is_left_out() -> None:
    """A causal row sees itself: the value of a hidden key is kept only where it could weigh."""
    found = {}
    for low in (-math.inf, torch.finfo(torch.float32).min, -1e9):

        class Causal(torch.nn.Module):
            def __init__(self, low: float) -> None:
                super().__init__()
                self.low, self.embed = low, torch.nn.Embedding(40, 8)

            def forward(self, ids: torch.Tensor) -> torch.Tensor:
                q = self.embed(ids)[:, None]
                future = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
                return (q @ q.mT).masked_fill(future, self.low).softmax(-1) @ q

        graph = capture(Causal(low).eval(), torch.randint(0, 40, (2, 9)))
        apply(graph, *CLEANUP, "fuse_attention", "dead_code")
        (node,) = graph.calls(attention.SPEC.overload)
        found[low] = argument(node, "hidden"), argument(node, "empty_is_nan")
    assert list(found.values()) == [("", False), ("", False), ("-1000000000.0", False)]
