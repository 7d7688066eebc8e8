"""The fuse passes together, on whole models."""

from __future__ import annotations

import pytest
import torch
from helpers.run_graph import CLEANUP, FUSE, apply, assert_close, assert_idempotent, run
from helpers.tiny_models import tiny_llama

from graphopt.capture import capture
from graphopt.models.reference.llama import LlamaLike, LlamaLikeConfig


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_hugging_face_llama(dtype: torch.dtype, padded: bool) -> None:
    model = tiny_llama(layers=3).to(dtype)
    ids = torch.randint(0, 101, (3, 11))
    inputs = {"input_ids": ids}
    if padded:
        mask = torch.ones_like(ids)
        mask[1, 7:] = 0
        inputs["attention_mask"] = mask
    graph = capture(model, inputs)
    report = apply(graph, *CLEANUP, *FUSE)
    sites = {name: report.sites(name) for name in FUSE}
    assert sites == {"fuse_attention": 3, "fuse_norm": 7, "fuse_rope": 6, "fuse_mlp": 3}
    with torch.no_grad():
        expected = model(**inputs).logits
    actual = run(graph, *inputs.values())
    visible = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert_close(actual[visible], expected[visible], tolerance)
    assert_idempotent(graph, [*CLEANUP, *FUSE])


def test_our_own_llama() -> None:
    torch.manual_seed(0)
    model = LlamaLike(LlamaLikeConfig()).eval()
    ids = torch.randint(0, 256, (2, 13))
    graph = capture(model, ids)
    report = apply(graph, *CLEANUP, *FUSE)
    sites = {name: report.sites(name) for name in FUSE}
    assert sites == {"fuse_attention": 2, "fuse_norm": 5, "fuse_rope": 4, "fuse_mlp": 2}
    assert_close(run(graph, ids), model(ids))


def test_every_new_node_says_where_it_comes_from() -> None:
    graph = capture(tiny_llama())
    apply(graph, *CLEANUP, *FUSE)
    for node in graph.nodes:
        if node.op == "call_function" and str(node.target).startswith("graphopt."):
            assert node.meta["source"].startswith("modeling_llama.py:")
            assert node.meta["layer"]
            assert any("fuse_" in name for name in node.meta["history"])
            assert len(node.meta["history"]) > 1
