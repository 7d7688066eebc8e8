"""Capture: every node knows its shape, layer and line; masks keep their meaning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.run_graph import assert_close, run
from helpers.tiny_models import tiny_llama
from torch import Tensor, nn
from torch.export import Dim
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)

import graphopt
from graphopt.capture import capture
from graphopt.errors import CaptureError
from graphopt.ir.graph import argument
from graphopt.ir.verify import verify
from graphopt.models.reference.llama import LlamaLike, LlamaLikeConfig
from graphopt.ops import attention

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "head_dim": 8,
}


def attributes(graph: Any, name: str) -> list[Any]:
    return [argument(node, name) for node in graph.calls(attention.SPEC.overload)]


def test_every_node_has_type_layer_and_source() -> None:
    graph = capture(tiny_llama())
    verify(graph)
    calls = [n for n in graph.nodes if n.op == "call_function"]
    assert all(n.meta["val"] is not None for n in calls)
    in_layers = [n for n in calls if n.meta["layer"].startswith("model.layers.")]
    assert len(in_layers) > 50
    assert all(
        n.meta["source"].startswith("modeling_") or ".py:" in n.meta["source"]
        for n in calls
        if n.meta["layer"]
    )
    (q_proj,) = [n for n in calls if n.meta["layer"] == "model.layers.1.self_attn.q_proj"]
    assert "linear" in str(q_proj.target)


def test_sizes_are_symbolic_and_named() -> None:
    graph = capture(tiny_llama())
    (logits,) = graph.output_nodes
    assert sorted(graph.symbols.values()) == ["batch", "sequence"]
    assert [graph.symbols.get(str(s), s) for s in logits.meta["val"].shape] == [
        "batch",
        "sequence",
        101,
    ]


def test_tied_weights_are_one_weight() -> None:
    graph = capture(tiny_llama())
    assert "lm_head.weight" not in graph.weights
    assert graph.weights["model.embed_tokens.weight"].shape == (101, 64)


def test_the_models_own_attention_setting_is_restored() -> None:
    model = tiny_llama()
    before = model.config._attn_implementation
    capture(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("strict", [False, True])
def test_plain_modules(strict: bool) -> None:
    torch.manual_seed(0)
    model = LlamaLike(LlamaLikeConfig()).eval()
    ids = torch.randint(0, 256, (2, 9))
    graph = capture(model, ids, strict=strict)
    other = torch.randint(0, 256, (3, 5))
    assert_close(run(graph, other), model(other))
    sources = [
        n.meta["source"] for n in graph.nodes if n.meta.get("layer", "").startswith("layers.")
    ]
    assert any(source.startswith("llama_like.py:") for source in sources)


def test_exported_programs() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 101, (2, 7))
    shapes = {"input_ids": {0: Dim("b"), 1: Dim("s")}, "use_cache": None}
    kwargs = {"input_ids": ids, "use_cache": False}
    program = torch.export.export(model, (), kwargs, dynamic_shapes=shapes, strict=False)
    graph = capture(program)
    verify(graph)
    with torch.no_grad():
        assert_close(run(graph, ids), model(ids).logits)
    compiled = graphopt.compile(program, expect={"fuse_norm": 5})
    with torch.no_grad():
        assert_close(torch.as_tensor(compiled(ids)), model(ids).logits)
    with pytest.raises(CaptureError, match="its own example"):
        capture(program, ids)


def test_padding_is_an_operand_and_equals_eager() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 101, (3, 10))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    mask[2, 3:] = 0
    graph = capture(model, {"input_ids": ids, "attention_mask": mask})
    assert all(p is not None for p in attributes(graph, "pad_BT"))
    assert attributes(graph, "causal") == [True, True]
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    assert_close(run(graph, ids, mask)[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("length", [4, 11, 23])
def test_sliding_windows(length: int) -> None:
    torch.manual_seed(1)
    config = MistralConfig(**SMALL, sliding_window=6, attn_implementation="eager")
    model = MistralForCausalLM(config).eval()
    graph = capture(model)
    assert attributes(graph, "window") == [6, 6]
    assert attributes(graph, "mask") == [None, None]
    ids = torch.randint(0, 61, (2, length))
    with torch.no_grad():
        assert_close(run(graph, ids), model(ids).logits)


def test_softcap_and_alternating_windows() -> None:
    torch.manual_seed(1)
    config = Gemma2Config(**SMALL, sliding_window=6, attn_implementation="eager")
    model = Gemma2ForCausalLM(config).eval()
    graph = capture(model)
    assert sorted(attributes(graph, "window")) == [0, 6]
    assert attributes(graph, "softcap") == [50.0, 50.0]
    ids = torch.randint(0, 61, (2, 15))
    with torch.no_grad():
        assert_close(run(graph, ids), model(ids).logits)


def test_gpt2_and_bert() -> None:
    torch.manual_seed(1)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61)).eval()
    ids = torch.randint(0, 61, (2, 9))
    graph = capture(gpt2)
    assert attributes(graph, "causal") == [True, True]
    with torch.no_grad():
        assert_close(run(graph, ids), gpt2(ids).logits)
    bert = BertModel(
        BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            vocab_size=61,
        ),
        add_pooling_layer=False,
    ).eval()
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    graph = capture(bert, {"input_ids": ids, "attention_mask": mask})
    assert attributes(graph, "causal") == [False, False]
    with torch.no_grad():
        expected = bert(ids, attention_mask=mask).last_hidden_state
    assert_close(run(graph, ids, mask)[mask.bool()], expected[mask.bool()])


def test_a_4d_mask_stays_dense_and_is_never_dropped() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 101, (2, 6))
    mask = torch.zeros((2, 1, 6, 6))
    mask[:, :, :, 0] = torch.finfo(torch.float32).min
    mask[:, :, 0, 0] = 0.0
    example = {"input_ids": ids, "attention_mask": mask}
    graph = capture(model, example, dynamic=False)
    assert all(m is not None for m in attributes(graph, "mask"))
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        assert_close(run(graph, ids, mask), model(ids, attention_mask=mask).logits)


def test_packed_positions_stay_dense() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 101, (2, 8))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 5]])
    graph = capture(model, {"input_ids": ids, "position_ids": positions})
    assert all(m is not None for m in attributes(graph, "mask"))
    with torch.no_grad():
        assert_close(
            run(graph, ids, positions), model(ids, position_ids=positions, use_cache=False).logits
        )


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x + self.count


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (Stateful(), torch.ones(2, 3), "changes its state"),
        (
            DataDependent(),
            torch.ones(2, 3),
            r"Python branches on the value .* at test_capture.py:\d+",
        ),
        (nn.Linear(3, 3), None, "no example given"),
        (nn.Linear(3, 3), {"nothing": torch.ones(2, 3)}, "no argument 'nothing'"),
        (nn.Linear(3, 3), (torch.ones(2, 3), torch.ones(2, 3)), "2 example arguments"),
        (nn.Linear(3, 3), torch.ones(1, 3), "at least 2"),
        (nn.Linear(3, 3), {}, "no tensor"),
    ],
)
def test_what_cannot_be_captured_says_why(model: nn.Module, example: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(model.eval(), example)


def test_only_models_are_captured() -> None:
    with pytest.raises(CaptureError, match="cannot capture a str"):
        capture("smollm2-135m")  # type: ignore[arg-type]


def test_a_module_name_that_fx_cannot_write_is_refused() -> None:
    class Quoted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({'a"b': nn.Linear(4, 4)})

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.parts['a"b'](x)
            return out

    with pytest.raises(CaptureError, match="rename the module"):
        capture(Quoted().eval(), torch.randn(2, 4))
