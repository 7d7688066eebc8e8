"""The serving graph computes what the model computes, and is refused where rows mix."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.serving_steps import Steps
from helpers.tiny_models import CausalConvolution, tiny_llama
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.codegen.reference import ReferenceBackend
from graphopt.ir.graph import Graph
from graphopt.ops import kv_write, paged_attention
from graphopt.passes.manager import PassManager
from graphopt.passes.registry import default_passes
from graphopt.record.report import Rejection, Report


def insert(graph: Graph, *passes: str) -> Report:
    report = Report()
    PassManager([*passes, "insert_kv_cache"]).run(graph, report)
    return report


def refusal(model: nn.Module, example: Tensor | None = None) -> Rejection:
    graph = capture(model.eval(), example)
    before = graph.op_counts()
    report = insert(graph)
    (rejection,) = report.rejections("insert_kv_cache")
    assert graph.dialect == "captured"
    assert graph.op_counts() == before
    return rejection


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_paged_equals_dense_however_it_is_chunked(chunk: int, fused: bool) -> None:
    model = tiny_llama()
    graph = capture(model)
    insert(graph, *(set(default_passes()) - {"insert_kv_cache"} if fused else ()))
    prompts = [[random.randrange(101) for _ in range(n)] for n in (9, 1, 14)]
    executable = ReferenceBackend().lower_serving(graph, None, None)
    logits = Steps(executable, prompts).run_in_chunks(chunk)
    for prompt, rows in zip(prompts, logits, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)


def test_one_write_and_one_paged_attention_a_layer_and_nothing_dense_left() -> None:
    graph = capture(tiny_llama(layers=3))
    insert(graph)
    assert len(graph.calls(kv_write.SPEC.overload)) == 3
    assert len(graph.calls(paged_attention.SPEC.overload)) == 3
    assert graph.op_counts()["graphopt.attention"] == 0
    assert [spec.name for spec in graph.inputs if spec.kind == "cache"] == [
        f"{letter}_cache_{layer}" for layer in range(3) for letter in "kv"
    ]


def test_only_wanted_rows_reach_the_head() -> None:
    graph = capture(tiny_llama())
    insert(graph)
    head = [n for n in graph.nodes if n.op == "call_function" and n.meta["layer"] == "lm_head"]
    assert head
    ranks = [n.meta["val"].shape for n in head if n.meta["val"].ndim == 3]
    assert {graph.symbols[str(shape[1])] for shape in ranks} == {"logit_rows"}


def test_positions_replace_the_iota() -> None:
    graph = capture(tiny_llama())
    insert(graph)
    assert not any(name.startswith("aten.arange") for name in graph.op_counts())


def test_a_padding_mask_falls_away() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 101, (2, 8))
    graph = capture(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    insert(graph)
    prompts = [ids[0].tolist()]
    executable = ReferenceBackend().lower_serving(graph, None, None)
    (rows,) = Steps(executable, prompts).run_in_chunks(3)
    with torch.no_grad():
        expected = model(ids[:1]).logits[0]
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)


def test_running_twice_changes_nothing() -> None:
    graph = capture(tiny_llama())
    insert(graph)
    before = [(n.name, n.target) for n in graph.nodes]
    report = insert(graph)
    assert report.sites("insert_kv_cache") == 0
    assert [(n.name, n.target) for n in graph.nodes] == before


def test_a_causal_convolution_is_refused_with_op_and_source_line() -> None:
    rejection = refusal(CausalConvolution(), torch.ones((2, 8), dtype=torch.int64))
    assert rejection.code in ("rows-mixed", "rows-unknown")
    assert rejection.source.startswith("tiny_models.py:")


def test_the_convolution_itself_is_named() -> None:
    class Conv(CausalConvolution):
        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.conv(self.embed(input_ids).transpose(1, 2)).transpose(1, 2))

    model = Conv()
    model.conv = nn.Conv1d(16, 16, 3, padding=1)
    rejection = refusal(model, torch.ones((2, 8), dtype=torch.int64))
    assert "aten.conv1d" in rejection.text
    assert rejection.code == "rows-mixed"
    assert rejection.layer == "conv"
    assert rejection.source.startswith("test_insert_kv_cache.py:")


class Mixer(nn.Module):
    """Embeds, applies `mix` to [B, S, D], and projects."""

    def __init__(self, mix: str) -> None:
        super().__init__()
        self.embed, self.head, self.mix = nn.Embedding(31, 8), nn.Linear(8, 31), mix

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        if self.mix == "cumsum":
            x = torch.cumsum(x, 1)
        elif self.mix == "mean":
            x = x - x.mean(1, keepdim=True)
        elif self.mix == "softmax":
            x = torch.softmax(x, 1)
        elif self.mix == "flip":
            x = torch.flip(x, [1])
        elif self.mix == "outer":
            x = torch.matmul(torch.matmul(x, x.transpose(1, 2)), x)
        elif self.mix == "shift":
            x = torch.roll(x, 1, 1)
        elif self.mix == "length":
            x = x * input_ids.shape[1]
        elif self.mix == "bidirectional":
            h = x.unsqueeze(1)
            x = torch.nn.functional.scaled_dot_product_attention(h, h, h).squeeze(1)
        return self.head(x)


@pytest.mark.parametrize(
    "mix", ["cumsum", "mean", "softmax", "flip", "outer", "shift", "length", "bidirectional"]
)
def test_every_way_of_mixing_rows_is_refused_at_its_line(mix: str) -> None:
    rejection = refusal(Mixer(mix), torch.ones((2, 8), dtype=torch.int64))
    assert rejection.code in ("rows-mixed", "rows-unknown")
    assert rejection.source.startswith("test_insert_kv_cache.py:")


def test_a_model_without_attention_is_served() -> None:
    model = Mixer("none").eval()
    ids = torch.randint(0, 31, (2, 8))
    graph = capture(model, ids)
    insert(graph)
    executable = ReferenceBackend().lower_serving(graph, None, None)
    rows = Steps(executable, ids.tolist()).run_in_chunks(3)
    torch.testing.assert_close(torch.stack(rows), model(ids).detach())


def test_static_sequence_is_refused() -> None:
    graph = capture(tiny_llama(), torch.ones((2, 8), dtype=torch.int64), dynamic=False)
    (rejection,) = insert(graph).rejections("insert_kv_cache")
    assert rejection.code == "static-sequence"
