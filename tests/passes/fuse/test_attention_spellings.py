"""A property: any spelling of attention is fused and equal, or rejected with the right code."""

from __future__ import annotations

import pytest
import torch
from attention_spellings import Spelling, Spellings, inputs, kv_heads, spellings
from helpers.run_graph import CLEANUP, apply
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt.capture import capture
from graphopt.codegen.reference import ReferenceBackend
from graphopt.ir.graph import argument
from graphopt.ops import attention

CASES_A_MODEL = 20
DRAWN = st.lists(spellings(), min_size=CASES_A_MODEL, max_size=CASES_A_MODEL)
RULES = settings(
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
    ],
)


def check(drawn: list[Spelling]) -> None:
    """Fuse one model of many spellings and hold each to its word."""
    model = Spellings(drawn).eval()
    ids, mask = inputs()
    graph = capture(model, {"input_ids": ids, "attention_mask": mask})
    report = apply(graph, *CLEANUP, "fuse_attention", "dead_code")
    fused = {node.meta["layer"]: node for node in graph.calls(attention.SPEC.overload)}
    rejected = {r.layer: r.code for r in report.rejections("fuse_attention")}
    for i, spelling in enumerate(drawn):
        layer = f"parts.{i}"
        if spelling.code:
            assert layer not in fused, spelling
            assert rejected.get(layer) == spelling.code, (spelling, rejected.get(layer))
            continue
        assert layer in fused, (spelling, rejected.get(layer))
        node = fused[layer]
        assert argument(node, "mask") is None, spelling
        causal = spelling.meaning in ("causal", "window", "chunked", "causal+padded")
        assert argument(node, "causal") == causal, spelling
        assert argument(node, "window") == (
            3 if "window" in spelling.meaning or spelling.meaning == "two-sided" else 0
        ), spelling
        assert (argument(node, "pad_BT") is not None) == ("padded" in spelling.meaning), spelling
        assert bool(argument(node, "predicate")) == (spelling.meaning in ("chunked", "prefix"))
        assert argument(node, "k_BGTD").meta["val"].shape[1] == kv_heads(spelling), spelling
    ids, mask = inputs()
    with torch.no_grad():
        expected = model(ids, mask)
    found = ReferenceBackend().lower(graph)(ids, mask)
    for spelling, ours, theirs in zip(drawn, found, expected, strict=True):
        if spelling.spoil == "dropout":
            continue
        limit = 1e-5 if spelling.dtype == torch.float32 else 4e-2
        # A softmax over the queries (no attention) is nan where -inf hides a key from all of them.
        finite = theirs.isfinite()
        assert torch.equal(ours.isfinite(), finite), spelling
        assert finite.all() or spelling.spoil == "axis", spelling
        if not finite.any():
            continue
        error = (ours - theirs)[finite].abs().max() / theirs[finite].abs().max()
        assert error <= limit, (spelling, float(error))


@settings(RULES, max_examples=2)
@given(DRAWN)
def test_spellings(drawn: list[Spelling]) -> None:
    check(drawn)


@pytest.mark.exhaustive
@settings(RULES, max_examples=100)
@given(DRAWN)
def test_two_thousand_spellings(drawn: list[Spelling]) -> None:
    check(drawn)
