"""transformers models whose layers compute attention themselves keep transformers' masks."""

from __future__ import annotations

import pytest
import torch
from helpers.run_graph import assert_close, run
from helpers.tiny_models import tiny_llama
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CodeGenConfig,
    CodeGenForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    XGLMConfig,
    XGLMForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaModel

from graphopt.capture import capture
from graphopt.capture.mask_marker import MASK
from graphopt.ir.graph import Graph, argument
from graphopt.ops import attention

LAYERS = {"n_layer": 2, "n_head": 4}
MODELS: dict[str, tuple[type[PreTrainedModel], object]] = {
    "bloom": (BloomForCausalLM, BloomConfig(vocab_size=99, hidden_size=32, **LAYERS)),
    "gptj": (
        GPTJForCausalLM,
        GPTJConfig(vocab_size=99, n_positions=64, n_embd=32, rotary_dim=4, **LAYERS),
    ),
    "falcon": (
        FalconForCausalLM,
        FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    ),
    "falcon_alibi": (
        FalconForCausalLM,
        FalconConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
        ),
    ),
    "gpt_neo": (
        GPTNeoForCausalLM,
        GPTNeoConfig(
            vocab_size=99,
            max_position_embeddings=64,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=5,
        ),
    ),
    "mpt": (
        MptForCausalLM,
        MptConfig(vocab_size=99, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    ),
    "codegen": (
        CodeGenForCausalLM,
        CodeGenConfig(vocab_size=99, n_positions=64, n_embd=32, rotary_dim=4, **LAYERS),
    ),
    "xglm": (
        XGLMForCausalLM,
        XGLMConfig(
            vocab_size=99,
            d_model=32,
            ffn_dim=48,
            num_layers=2,
            attention_heads=4,
            max_position_embeddings=64,
        ),
    ),
}


def model_of(name: str) -> PreTrainedModel:
    kind, config = MODELS[name]
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Initial weights are so small that a wrong mask would hardly show.
            if parameter.ndim > 1:
                parameter.mul_(6)
    return model


def ids(*shape: int) -> Tensor:
    return torch.randint(3, 99, shape)


def check(model: PreTrainedModel, graph: Graph, *shape: int) -> None:
    other = ids(*shape)
    with torch.no_grad():
        assert_close(run(graph, other), model(other).logits, 1e-4)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["bloom", "gptj", "falcon", "mpt"])
def test_fixed_sizes(name: str, batch: int) -> None:
    model = model_of(name)
    before = model.config._attn_implementation
    graph = capture(model, ids(batch, 16), dynamic=False)
    assert model.config._attn_implementation == before
    check(model, graph, batch, 16)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"mpt"}))
def test_dynamic_sizes(name: str) -> None:
    model = model_of(name)
    graph = capture(model, ids(2, 16))
    for shape in ((1, 7), (3, 40), (4, 4)):
        check(model, graph, *shape)


def test_a_model_that_computes_with_its_longest_sequence_is_limited_to_it() -> None:
    # MPT cuts its bias at max(0, longest - length).
    model = model_of("mpt")
    graph = capture(model, ids(2, 16))
    for length in (3, 16, 40):
        check(model, graph, 3, length)
    assert any("64" in str(limit) for limit in graph.limits)


@pytest.mark.parametrize("name", ["bloom", "gptj", "falcon"])
def test_one_batch_item_and_a_dynamic_sequence(name: str) -> None:
    model = model_of(name)
    graph = capture(model, ids(1, 16), dynamic={"input_ids": {1: "sequence"}})
    for length in (2, 9, 40):
        check(model, graph, 1, length)


def test_padding_of_a_model_that_masks_for_itself() -> None:
    model = model_of("bloom")
    example = ids(2, 16)
    mask = torch.ones_like(example)
    graph = capture(model, {"input_ids": example, "attention_mask": mask})
    other, padded = ids(3, 9), torch.ones(3, 9, dtype=torch.int64)
    padded[0, :3] = 0
    with torch.no_grad():
        expected = model(other, attention_mask=padded).logits
    assert_close(run(graph, other, padded)[padded.bool()], expected[padded.bool()], 1e-4)


class AlsoScales(LlamaModel):
    """A Llama that also uses the mask it made for something else than attention."""

    def forward(self, input_ids: Tensor, **options: object) -> object:
        from transformers.masking_utils import create_causal_mask

        embeds = self.embed_tokens(input_ids)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=embeds,
            attention_mask=None,
            past_key_values=None,
            position_ids=None,
        )
        options.pop("inputs_embeds", None)
        if mask is not None and mask.ndim == 2:
            embeds = embeds * (1.0 + mask[..., None])
        options.pop("attention_mask", None)
        return super().forward(inputs_embeds=embeds, **options)


def test_a_mask_that_is_read_elsewhere_too() -> None:
    model: LlamaForCausalLM = tiny_llama()
    model.model.__class__ = AlsoScales
    graph = capture(model, torch.randint(0, 101, (2, 9)))
    other = torch.randint(0, 101, (3, 12))
    with torch.no_grad():
        assert_close(run(graph, other), model(other).logits, 1e-4)


def test_no_marker_is_left_and_meanings_are_kept() -> None:
    model = tiny_llama()
    example = torch.randint(0, 101, (2, 9))
    graph = capture(model, {"input_ids": example, "attention_mask": torch.ones_like(example)})
    assert graph.calls(MASK) == []
    calls = graph.calls(attention.SPEC.overload)
    assert [argument(node, "causal") for node in calls] == [True, True]
    assert all(argument(node, "pad_BT") is not None for node in calls)
