"""The hand-written models: against Hugging Face's with the same weights, and exported."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from graphopt.models.reference.attention import attend
from graphopt.models.reference.bert import BertLike, BertLikeConfig
from graphopt.models.reference.gpt2 import GPT2Like, GPT2LikeConfig
from graphopt.models.reference.llama import LlamaLike, LlamaLikeConfig

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def randomize(module: nn.Module) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1))
    return module.eval()


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, 256, (batch, length))


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_llama_like_equals_hugging_face(kv_heads: int, tied: bool) -> None:
    model = randomize(LlamaLike(LlamaLikeConfig(kv_heads=kv_heads, tie_embeddings=tied)))
    oracle = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=kv_heads, rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
        )
    ).eval()  # fmt: skip
    state = model.state_dict()
    renamed = {
        name if name.startswith("lm_head") else f"model.{name}": state[name] for name in state
    }
    oracle.load_state_dict(renamed)
    batch = ids(2, 33)
    torch.testing.assert_close(model(batch), oracle(batch).logits, **TOLERANCE)


@torch.no_grad()
def test_gpt2_like_equals_hugging_face() -> None:
    model = randomize(GPT2Like(GPT2LikeConfig()))
    oracle = GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=128)
    ).eval()
    names = {
        "tokens": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f",
        "attention_norm": "ln_1", "mlp_norm": "ln_2", "attention.qkv_proj": "attn.c_attn",
        "attention.out_proj": "attn.c_proj", "up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj",
        "lm_head": "lm_head",
    }  # fmt: skip
    renamed = {}
    for name, value in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if stem.startswith("layers."):
            _, layer, leaf = stem.split(".", 2)
            # Hugging Face keeps these matrices transposed (its Conv1D).
            turned = value.T if leaf.endswith("_proj") and suffix == "weight" else value
            renamed[f"transformer.h.{layer}.{names[leaf]}.{suffix}"] = turned
        else:
            renamed[f"{names[stem]}.{suffix}"] = value
    oracle.load_state_dict(renamed)
    batch = ids(2, 33)
    torch.testing.assert_close(model(batch), oracle(batch).logits, **TOLERANCE)


@torch.no_grad()
def test_bert_like_equals_hugging_face() -> None:
    model = randomize(BertLike(BertLikeConfig()))
    config = BertConfig(
        vocab_size=256, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    oracle = BertModel(config, add_pooling_layer=False).eval()
    names = {
        "tokens": "embeddings.word_embeddings", "positions": "embeddings.position_embeddings",
        "norm": "embeddings.LayerNorm", "attention.query": "attention.self.query",
        "attention.key": "attention.self.key", "attention.value": "attention.self.value",
        "attention.out_proj": "attention.output.dense", "up_proj": "intermediate.dense",
        "attention_norm": "attention.output.LayerNorm", "down_proj": "output.dense",
        "mlp_norm": "output.LayerNorm",
    }  # fmt: skip
    renamed = {"embeddings.token_type_embeddings.weight": torch.zeros(2, 64)}
    for name, value in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if stem.startswith("layers."):
            _, layer, leaf = stem.split(".", 2)
            renamed[f"encoder.layer.{layer}.{names[leaf]}.{suffix}"] = value
        else:
            renamed[f"{names[stem]}.{suffix}"] = value
    oracle.load_state_dict(renamed)
    batch = ids(3, 17)
    mask = (torch.arange(17) < torch.tensor([[17], [9], [1]])).long()
    expected = oracle(batch, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(model(batch, mask), expected, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [lambda: LlamaLike(LlamaLikeConfig()), lambda: GPT2Like(GPT2LikeConfig())]
)
def test_decoders_do_not_look_ahead(make: Callable[[], nn.Module]) -> None:
    model = randomize(make())
    batch = ids(1, 20)
    changed = batch.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 256
    before, after = model(batch), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], **TOLERANCE)
    assert not torch.allclose(before[:, 12:], after[:, 12:], **TOLERANCE)


@torch.no_grad()
def test_bert_like_looks_both_ways_but_not_at_padding() -> None:
    model = randomize(BertLike(BertLikeConfig()))
    batch = ids(1, 10)
    mask = (torch.arange(10) < 7).long()[None]
    base = model(batch, mask)
    padded, last = batch.clone(), batch.clone()
    padded[:, 7:] = (padded[:, 7:] + 1) % 256
    last[:, 6] = (last[:, 6] + 1) % 256
    torch.testing.assert_close(model(padded, mask)[:, :7], base[:, :7], **TOLERANCE)
    assert not torch.allclose(model(last, mask)[:, 0], base[:, 0], **TOLERANCE)


def test_fully_hidden_query_averages() -> None:
    q, k, v = torch.randn(3, 1, 1, 4, 8)[:, None].unbind(0)
    hidden = torch.tensor([False, True, False, False])[:, None].expand(4, 4)
    out = attend(q, k, v, hidden)
    torch.testing.assert_close(out[..., 1, :], v.mean(dim=-2))


EXPORTED = [
    pytest.param(lambda: LlamaLike(LlamaLikeConfig()), False, id="llama_like"),
    pytest.param(lambda: GPT2Like(GPT2LikeConfig()), False, id="gpt2_like"),
    pytest.param(lambda: BertLike(BertLikeConfig()), True, id="bert_like"),
]


@torch.no_grad()
@pytest.mark.parametrize(("make", "masked"), EXPORTED)
def test_exports_with_dynamic_batch_and_sequence(
    make: Callable[[], nn.Module], masked: bool
) -> None:
    model = randomize(make())

    def example(batch: int, length: int) -> tuple[Tensor, ...]:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, length // 2 + 1 :] = 0
        return (ids(batch, length), mask) if masked else (ids(batch, length),)

    dims = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("sequence", max=128)}
    inputs = example(2, 11)
    program = torch.export.export(
        model, inputs, dynamic_shapes=tuple(dims for _ in inputs), strict=False
    )
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("scaled_dot_product" in target for target in targets)
    for batch, length in [(2, 11), (5, 3), (1, 128), (3, 1)]:
        inputs = example(batch, length)
        torch.testing.assert_close(program.module()(*inputs), model(*inputs), **TOLERANCE)


@pytest.mark.parametrize("config", [LlamaLikeConfig(), GPT2LikeConfig(), BertLikeConfig()])
def test_configs_are_frozen(config: Any) -> None:
    with pytest.raises(AttributeError):
        setattr(config, fields(config)[0].name, 1)
