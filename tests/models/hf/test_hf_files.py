"""What a model's folder says beyond its parameters: honoured, told, or refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gguf_samples import TOKENS, randomize, tiny_llama
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from graphopt.config import Config
from graphopt.errors import UnsupportedError, WeightFormatError
from graphopt.models import load

SIZES: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
MAKERS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "gpt2": lambda: randomize(
        GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=16))
    ),
    "bert": lambda: randomize(
        BertForMaskedLM(
            BertConfig(hidden_size=32, intermediate_size=48, max_position_embeddings=16, **SIZES)
        )
    ),
}
IDS = torch.arange(14).view(2, 7)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(cache=tmp_path / "cache", offline=True)


def saved(folder: Path, name: str = "llama", **tensors: torch.Tensor) -> Any:
    """A tiny model in `folder`, with more tensors in its file."""
    model = MAKERS[name]()
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})
    return model


def edit(folder: Path, file: str = "config.json", **changes: Any) -> None:
    path = folder / file
    stated = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**stated, **changes}))


def logits(module: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(IDS).logits


def triangle(size: int = 16) -> torch.Tensor:
    return torch.ones(1, 1, size, size).tril()


LLAMA_LAYER = "model.layers.0.self_attn"


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("llama", {f"{LLAMA_LAYER}.rotary_emb.inv_freq": 5000.0 ** -(torch.arange(8) / 8)}),
        ("llama", {f"{LLAMA_LAYER}.rotary_emb.cos_cached": torch.rand(1, 1, 4, 16)}),
        ("llama", {"model.rotary_emb.inv_freq": 5000.0 ** -(torch.arange(8) / 8)}),
        ("gpt2", {"transformer.h.0.attn.bias": triangle()}),
        ("gpt2", {"transformer.h.0.attn.bias": triangle().bool()}),
        ("gpt2", {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}),
        ("gpt2", {"h.0.attn.bias": triangle(), "h.0.attn.masked_bias": torch.tensor(-1e9)}),
        ("gpt2", {"model.decoder.version": torch.tensor([3.0])}),
        ("bert", {"bert.embeddings.position_ids": torch.arange(16)[None]}),
        ("bert", {"bert.embeddings.token_type_ids": torch.zeros(1, 16, dtype=torch.long)}),
    ],
)
def test_buffers_of_older_classes_are_harmless(
    tmp_path: Path, config: Config, name: str, tensors: dict[str, torch.Tensor]
) -> None:
    model = saved(tmp_path / "m", name, **tensors)
    source = load(tmp_path / "m", config=config)
    assert torch.equal(logits(source.module), logits(model))
    assert source.notes == ()


@pytest.mark.parametrize(
    ("name", "tensor", "value"),
    [
        ("llama", "model.layers.0.mlp.extra_proj.weight", torch.rand(4, 4)),
        ("llama", "model.layers.0.self_attn.attention.masked_bias", torch.tensor(0.0)),
        ("gpt2", "transformer.h.0.attn.bias", torch.ones(1, 1, 16, 16)),
        ("gpt2", "transformer.h.0.attn.bias", triangle().roll(1, -1)),
        ("gpt2", "transformer.h.0.attn.masked_bias", torch.tensor(-1.0)),
        ("gpt2", "transformer.h.0.attn.scale", torch.tensor(2.0)),
        ("bert", "bert.embeddings.position_ids", torch.arange(16)[None] + 2),
        ("bert", "bert.embeddings.token_type_ids", torch.ones(1, 16, dtype=torch.long)),
        ("bert", "bert.embeddings.extra", torch.ones(3)),
    ],
)
def test_tensors_that_matter_are_refused_by_name(
    tmp_path: Path, config: Config, name: str, tensor: str, value: torch.Tensor
) -> None:
    saved(tmp_path / "m", name, **{tensor: value})
    with pytest.raises(WeightFormatError) as caught:
        load(tmp_path / "m", config=config)
    assert f"unexpected ['{tensor}']" in str(caught.value)


def test_heads_of_pretraining_are_told(tmp_path: Path, config: Config) -> None:
    """The files of bert-base hold them beside the language model's head."""
    heads = {
        "bert.pooler.dense.weight": torch.rand(32, 32),
        "cls.seq_relationship.bias": torch.rand(2),
    }
    model = saved(tmp_path / "m", "bert", **heads)
    source = load(tmp_path / "m", config=config)
    assert torch.equal(logits(source.module), logits(model))
    (note,) = source.notes
    assert note.startswith(
        "bert.pooler.dense.weight, cls.seq_relationship.bias: heads that BertFor"
    )


def test_other_rotary_frequencies_are_told(tmp_path: Path, config: Config) -> None:
    name = f"{LLAMA_LAYER}.rotary_emb.inv_freq"
    model = saved(tmp_path / "m", **{name: torch.rand(8)})
    source = load(tmp_path / "m", config=config)
    assert torch.equal(logits(source.module), logits(model))
    (note,) = source.notes
    assert note.startswith(f"{name}: rotary frequencies in the file that are not those of the")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50\.0.*LlamaForCausalLM"),
        ({"logits_scaling": 8.0}, r"logits_scaling=8\.0"),
        ({"embedding_multiplier": 12.0}, r"embedding_multiplier=12\.0"),
        ({"sliding_window": 4}, "sliding_window=4"),
        ({"causal": False}, "causal=False"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor in"),
        ({"alibi": True}, "alibi=True"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config.*gptq"),
        ({"quantization": {"bits": 4}}, "quantization .*bits.*not read"),
        ({"rope_parameters": {"rope_type": "default", "factor": 8.0, "rope_theta": 1e4}}, "factor"),
        ({"rope_scaling": {"rope_type": "foo", "factor": 2.0}}, "rotary settings.*foo"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "short_factor": [1]}}, "short_factor"),
        (
            {"architectures": ["MyLlama"], "auto_map": {"AutoModelForCausalLM": "m.MyLlama"}},
            r"auto_map.*m\.MyLlama.*MyLlama, which transformers does not have",
        ),
    ],
)  # fmt: skip
def test_settings_that_nobody_reads_are_refused_by_name(
    tmp_path: Path, config: Config, changes: dict[str, Any], text: str
) -> None:
    saved(tmp_path / "m")
    if "rope_scaling" in changes:
        path = tmp_path / "m" / "config.json"
        stated = json.loads(path.read_text())
        del stated["rope_parameters"]
        path.write_text(json.dumps(stated))
    edit(tmp_path / "m", **changes)
    with pytest.raises(UnsupportedError, match=text) as caught:
        load(tmp_path / "m", config=config)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"attn_logit_softcapping": None, "logits_scaling": 1.0, "num_local_experts": 0}, ()),
        ({"sliding_window": None, "use_sliding_window": False, "is_causal": True}, ()),
        ({"layer_types": ["full_attention"] * 2, "torch_dtype": "bfloat16"}, ()),
        ({"_name_or_path": "x", "pretraining_tp": 1, "tokenizer_class": "LlamaTokenizer"}, ()),
        ({"auto_map": {"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}}, ()),
        ({"some_key": 3, "another": "x"}, ("some_key=3, another='x': not read by Llama",)),
        ({"architectures": ["LLaMAForCausalLM"]}, ("LLaMA", "loaded as LlamaForCausalLM")),
        ({"architectures": ["LlamaForCausalLM", "Other"]}, ("loaded as LlamaForCausalLM",)),
    ],
)
def test_other_settings_are_harmless_or_told(
    tmp_path: Path, config: Config, changes: dict[str, Any], told: tuple[str, ...]
) -> None:
    model = saved(tmp_path / "m")
    edit(tmp_path / "m", **changes)
    source = load(tmp_path / "m", config=config)
    assert torch.equal(logits(source.module), logits(model))
    assert len(source.notes) == bool(told)
    assert all(text in source.notes[0] for text in told)


def test_attention_without_a_triangle_is_read(tmp_path: Path, config: Config) -> None:
    saved(tmp_path / "m")
    edit(tmp_path / "m", is_causal=False)
    module = load(tmp_path / "m", config=config).module
    other = IDS.clone()
    other[:, -1] += 1
    with torch.no_grad():
        first, second = module(IDS).logits[:, 0], module(other).logits[:, 0]
    assert not torch.equal(first, second)


def test_old_rotary_settings_are_read(tmp_path: Path, config: Config) -> None:
    """Their names before transformers 5."""
    saved(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    stated = json.loads(path.read_text())
    del stated["rope_parameters"]
    scaling = {"type": "linear", "factor": 2.0}
    path.write_text(json.dumps({**stated, "rope_theta": 500.0, "rope_scaling": scaling}))
    source = load(tmp_path / "m", config=config)
    assert source.notes == ()
    expected = 500.0 ** -(torch.arange(8) / 8) / 2
    torch.testing.assert_close(source.module.model.rotary_emb.inv_freq, expected)


def test_position_embeddings_of_a_kind_that_is_gone(tmp_path: Path, config: Config) -> None:
    saved(tmp_path / "m", "bert")
    edit(tmp_path / "m", position_embedding_type="absolute", gradient_checkpointing=False)
    assert load(tmp_path / "m", config=config).notes == ()
    edit(tmp_path / "m", position_embedding_type="relative_key")
    with pytest.raises(UnsupportedError, match="position_embedding_type='relative_key'"):
        load(tmp_path / "m", config=config)


def test_an_adapter_is_refused(tmp_path: Path, config: Config) -> None:
    saved(tmp_path / "m")
    edit(tmp_path / "m", "adapter_config.json", peft_type="LORA")
    with pytest.raises(UnsupportedError, match=r"adapter_config\.json.*merge_and_unload"):
        load(tmp_path / "m", config=config)
    (tmp_path / "alone").mkdir()
    edit(tmp_path / "alone", "adapter_config.json", peft_type="LORA")
    with pytest.raises(UnsupportedError, match=r"adapter_config\.json.*merge_and_unload"):
        load(tmp_path / "alone", config=config)


def test_other_modules_of_a_pipeline_are_told(tmp_path: Path, config: Config) -> None:
    saved(tmp_path / "m", "bert")
    kinds = ("Transformer", "Pooling", "Dense")
    modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (tmp_path / "m" / "modules.json").write_text(json.dumps(modules))
    (note,) = load(tmp_path / "m", config=config).notes
    assert note.startswith("modules.json: Pooling, Dense come behind the transformer")
    (tmp_path / "m" / "modules.json").write_text("{}")
    assert load(tmp_path / "m", config=config).notes == ()
    (tmp_path / "m" / "modules.json").write_text("[1]")
    with pytest.raises(WeightFormatError, match=r"modules\.json is damaged"):
        load(tmp_path / "m", config=config)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "m", max_shard_size="40KB")
    return tmp_path / "m"


def test_shards_and_their_index(shards: Path, config: Config) -> None:
    index = shards / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    name, shard = next(iter(table["weight_map"].items()))

    def refused(weight_map: dict[str, str]) -> str:
        index.write_text(json.dumps({**table, "weight_map": weight_map}))
        with pytest.raises(WeightFormatError) as caught:
            load(shards, config=config)
        return str(caught.value)

    whole = dict(table["weight_map"])
    assert f"holds {name}, which" in refused({k: v for k, v in whole.items() if k != name})
    other = next(place for place in whole.values() if place != shard)
    assert f"lacks {name}, which" in refused({**whole, name: other})
    assert "gone.safetensors could not be read" in refused({**whole, name: "gone.safetensors"})
    assert "does not name files" in refused({**whole, name: 3})  # type: ignore[dict-item]
    index.write_text(json.dumps(table))
    assert load(shards, config=config).notes == ()
    (shards / shard).unlink()
    with pytest.raises(WeightFormatError, match=f"{shard} could not be read: it is missing"):
        load(shards, config=config)


def test_one_file_and_shards_beside_it(shards: Path, config: Config) -> None:
    model = tiny_llama()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(state, shards / "model.safetensors", metadata={"format": "pt"})
    source = load(shards, config=config)
    assert torch.equal(logits(source.module), logits(model))
    (note,) = source.notes
    assert note.startswith("model.safetensors is read; model.safetensors.index.json beside it")


def test_an_end_token_that_only_the_tokenizer_knows(tmp_path: Path, config: Config) -> None:
    saved(tmp_path / "m")
    words = WordLevel({token: index for index, token in enumerate(TOKENS)}, unk_token="a")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), eos_token="<|im_end|>"
    )  # fmt: skip
    tokenizer.save_pretrained(tmp_path / "m")
    found = []
    for stated in (7, [2, 7]):
        edit(tmp_path / "m", "generation_config.json", eos_token_id=stated)
        source = load(tmp_path / "m", config=config)
        assert source.eos_token_ids == (2, 7)
        found.append(source.notes)
    assert found == [("tokenizer: eos_token '<|im_end|>' (2) ends generation, too",), ()]
