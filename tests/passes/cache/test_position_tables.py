"""Tables cut to the length of the sequence are read at each row's own position when serving."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from helpers.serving_steps import Steps
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel

import graphopt
from graphopt.capture import capture
from graphopt.codegen.reference import ReferenceBackend
from graphopt.ir.graph import Graph
from graphopt.passes.manager import PassManager
from graphopt.record.report import Report

WIDTH, VOCABULARY, LONGEST = 8, 31, 24
Add = Callable[["Tables", Tensor], Tensor]


def cut(model: Tables, ids: Tensor) -> Tensor:
    return model.rows[: ids.shape[1]]


def cut_with_offset(model: Tables, ids: Tensor) -> Tensor:
    return model.rows[2 : ids.shape[1] + 2]


def narrowed(model: Tables, ids: Tensor) -> Tensor:
    return model.rows.narrow(0, 0, ids.shape[1])


def cut_second_axis(model: Tables, ids: Tensor) -> Tensor:
    return model.rows[None, :, :][:, : ids.shape[1]]


def cut_columns(model: Tables, ids: Tensor) -> Tensor:
    return model.columns[:, : ids.shape[1]].transpose(0, 1)


def repeated_for_the_batch(model: Tables, ids: Tensor) -> Tensor:
    return model.rows.repeat(ids.shape[0], 1, 1)[:, : ids.shape[1]]


def looked_up(model: Tables, ids: Tensor) -> Tensor:
    return model.embed_positions(model.numbers[:, : ids.shape[1]])


def looked_up_per_item(model: Tables, ids: Tensor) -> Tensor:
    return model.embed_positions(model.numbers.expand(ids.shape[0], -1)[:, : ids.shape[1]])


def gathered(model: Tables, ids: Tensor) -> Tensor:
    kinds = model.kinds.expand(ids.shape[0], -1)
    return model.embed_positions(kinds.gather(1, model.numbers[:, : ids.shape[1]].expand_as(ids)))


class Tables(nn.Module):
    """Embedding plus what `add` reads from tables; one causal head; then `after` the attention."""

    def __init__(self, add: Add, at_the_end: bool = False) -> None:
        super().__init__()
        self.add, self.at_the_end = add, at_the_end
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.embed_positions = nn.Embedding(LONGEST, WIDTH)
        self.rows = nn.Parameter(torch.randn(LONGEST, WIDTH))
        self.columns = nn.Parameter(torch.randn(WIDTH, LONGEST))
        self.register_buffer("numbers", torch.arange(LONGEST)[None])
        self.register_buffer("kinds", torch.randint(0, LONGEST, (1, LONGEST)))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        if not self.at_the_end:
            x = x + self.add(self, input_ids)
        h = x[:, None]
        x = x + nn.functional.scaled_dot_product_attention(h, h, h, is_causal=True)[:, 0]
        if self.at_the_end:
            x = x * self.add(self, input_ids)
        return self.head(x)


def serving_graph(model: nn.Module) -> Graph:
    graph = capture(model, torch.randint(0, VOCABULARY, (2, 9)))
    PassManager(["fuse_attention", "insert_kv_cache"]).run(graph, report := Report())
    assert graph.dialect == "serving", report.rejections("insert_kv_cache")
    return graph


@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize(
    "add",
    [
        cut,
        cut_with_offset,
        narrowed,
        cut_second_axis,
        cut_columns,
        repeated_for_the_batch,
        looked_up,
        looked_up_per_item,
        gathered,
    ],
)
def test_each_row_reads_the_table_at_its_position(add: Add, at_the_end: bool) -> None:
    model = Tables(add, at_the_end).eval()
    executable = ReferenceBackend().lower_serving(serving_graph(model), None, None)
    prompts = [[random.randrange(VOCABULARY) for _ in range(n)] for n in (9, 1, 20)]
    logits = Steps(executable, prompts).run_in_chunks(3)
    for prompt, rows in zip(prompts, logits, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(rows, model(torch.tensor([prompt]))[0])


@pytest.mark.parametrize("add", [cut, cut_columns, looked_up])
def test_the_cpu_backend_serves_them_too(add: Add) -> None:
    model = Tables(add).eval()
    program = graphopt.compile(
        model, torch.randint(0, VOCABULARY, (2, 9)), serving="required", backend="cpu"
    )
    ids = torch.randint(0, VOCABULARY, (3, 13))
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(program(ids)), model(ids), rtol=1e-4, atol=1e-5)
    (completion,) = program.generate(ids[0, :4].tolist(), max_tokens=9, ignore_eos=True)
    text = ids[:1, :4]
    for _ in range(9):
        with torch.no_grad():
            text = torch.cat([text, model(text)[:, -1].argmax(-1, keepdim=True)], 1)
    assert list(completion.tokens) == text[0, 4:].tolist()


def test_a_table_of_rows_is_looked_up_natively() -> None:
    graph = serving_graph(Tables(cut).eval())
    assert graph.op_counts()["aten.embedding"] == 2
    picked = [node.args[0].op for node in graph.calls(torch.ops.aten.index_select.default)]
    assert "get_attr" not in picked


def test_an_iota_after_the_last_attention_is_read_at_the_wanted_rows() -> None:
    def counted(_: Tables, ids: Tensor) -> Tensor:
        return torch.arange(ids.shape[1])[:, None] * 0.5

    model = Tables(counted, at_the_end=True).eval()
    executable = ReferenceBackend().lower_serving(serving_graph(model), None, None)
    prompt = [random.randrange(VOCABULARY) for _ in range(7)]
    (rows,) = Steps(executable, [prompt]).run_in_chunks(2)
    with torch.no_grad():
        torch.testing.assert_close(rows, model(torch.tensor([prompt]))[0])


def test_a_bert_decoder_is_served() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        is_decoder=True,
    )
    model = BertLMHeadModel(config).eval()
    graph = capture(model)
    PassManager(["insert_kv_cache"]).run(graph, report := Report())
    assert graph.dialect == "serving", report.rejections("insert_kv_cache")
    executable = ReferenceBackend().lower_serving(graph, None, None)
    prompts = [[random.randrange(VOCABULARY) for _ in range(n)] for n in (9, 40)]
    for prompt, rows in zip(prompts, Steps(executable, prompts).run_in_chunks(7), strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt]), use_cache=False).logits[0]
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)
