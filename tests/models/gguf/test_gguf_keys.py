"""Every metadata key is honoured, known to change nothing, or refused by its name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from helpers.gguf_samples import KV_HEADS, SIZES, tiny_llama, write_gguf

from graphopt.config import Config
from graphopt.errors import UnsupportedError, WeightFormatError
from graphopt.models import load
from graphopt.models.gguf import keys as gguf_keys
from graphopt.models.gguf import tokenizer as gguf_tokenizer
from graphopt.models.gguf.keys import check_keys

TABLES = {
    "honoured": gguf_keys.HONOURED,
    "harmless": gguf_keys.HARMLESS,
    "neutral": gguf_keys.NEUTRAL.keys(),
    "same": gguf_keys.SAME_AS.keys(),
    "off": gguf_keys.OFF,
}
PATH = Path("some.gguf")


def constants(group: type = gguf.constants.Keys) -> Iterator[str]:
    """Every key that the gguf package knows."""
    for name, value in vars(group).items():
        if isinstance(value, type):
            yield from constants(value)
        elif isinstance(value, str) and not name.startswith("_"):
            yield value


def architecture_keys() -> list[str]:
    keys = {
        key.replace("{dense}", dense) for key in constants() for dense in ("dense_2", "dense_3")
    }
    return sorted(key.removeprefix("{arch}.") for key in keys if key.startswith("{arch}."))


def test_the_tables_are_apart_and_hold_every_key_of_the_gguf_package() -> None:
    names = architecture_keys()
    assert len(names) > 100
    for name in names:
        assert sum(name in table for table in TABLES.values()) == 1, name
    for first in TABLES:
        for second in TABLES:
            assert first == second or not set(TABLES[first]) & set(TABLES[second])


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_every_key_with_a_value_that_matters_is_refused_by_name(architecture: str) -> None:
    free = TABLES["honoured"] | TABLES["harmless"]
    for name in [*architecture_keys(), "a_key_of_tomorrow"]:
        key = f"{architecture}.{name}"
        for value in (7, 0.75, "other", [0, 3], name != "attention.causal"):
            metadata = {"general.architecture": architecture, key: value}
            if name in free or value in gguf_keys.NEUTRAL.get(name, ()):
                assert check_keys(PATH, metadata, architecture) == ()
                continue
            with pytest.raises(UnsupportedError) as caught:
                check_keys(PATH, metadata, architecture)
            assert key in str(caught.value)
            assert str(PATH) in str(caught.value)
            assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"attention.causal": True},
        {"attention.sliding_window": 0, "attention.sliding_window_pattern": [False, False]},
        {"attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0},
        {"expert_count": 0, "expert_used_count": 0, "expert_weights_norm": False},
        {"logit_scale": 1.0, "residual_scale": 1.0, "embedding_scale": 0.0},
        {"attention.scale": 0.25, "attention.key_length": 16},
        {"attention.scale": 0.25, "embedding_length": 64, "attention.head_count": 4},
        {"rope.freq_base_swa": 5000.0, "rope.freq_base": 5000.0},
        {"rope.dimension_sections": [0, 0, 0, 0], "pooling_type": 0},
        {"rope.scaling.attn_factor": 1.0, "rope.scaling.original_context_length": 4096},
    ],
)
def test_values_that_change_nothing_are_accepted(keys: dict[str, Any]) -> None:
    metadata = {f"llama.{key}": value for key, value in keys.items()}
    assert check_keys(PATH, metadata, "llama") == ()


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({"general.type": "adapter"}, r"general\.type='adapter'; 'model' is read"),
        ({"general.type": "mmproj"}, r"general\.type='mmproj'"),
        ({"general.quantization_version": 1}, r"general\.quantization_version=1; 2 is read"),
        ({"adapter.lora.alpha": 16.0}, r"adapter\.lora\.alpha=16\.0"),
        ({"xielu.alpha_p": [0.5]}, r"xielu\.alpha_p"),
        ({"clip.has_vision_encoder": True}, r"clip\.has_vision_encoder"),
        ({"diffusion.shift_logits": False}, r"diffusion\.shift_logits"),
        ({"llama.attention.scale": 0.2}, r"attention\.scale=0\.2"),
        ({"llama.attention.scale": 0.2, "llama.attention.key_length": 16}, "scale=0"),
        ({"llama.rope.freq_base_swa": 1.0, "llama.rope.freq_base": 2.0}, "freq_base_swa"),
    ],
)  # fmt: skip
def test_other_kinds_of_file_are_refused_by_name(metadata: dict[str, Any], text: str) -> None:
    with pytest.raises(UnsupportedError, match=text):
        check_keys(PATH, metadata, "llama")


def test_what_nobody_reads_is_told() -> None:
    metadata = {
        "general.architecture": "llama",
        "general.name": "x",
        "general.sampling.temp": 0.6,
        "quantize.imatrix.file": "y",
        "tokenizer.ggml.model": "gpt2",
        "qwen2.attention.causal": False,
        "somebody.quantized_by": "z",
    }
    sampling, other = check_keys(PATH, metadata, "llama")
    assert "general.sampling.temp=0.6: not applied" in sampling
    assert other.endswith("nothing reads: qwen2.attention.causal, somebody.quantized_by")


def test_tokenizer_keys_of_the_gguf_package_are_all_known() -> None:
    known = gguf_tokenizer.READ | gguf_tokenizer.HARMLESS | gguf_tokenizer.OFF
    keys = {key for key in constants() if key.startswith("tokenizer.ggml.")}
    assert {key.removeprefix("tokenizer.ggml.") for key in keys} <= known
    assert not gguf_tokenizer.READ & gguf_tokenizer.HARMLESS
    assert not (gguf_tokenizer.READ | gguf_tokenizer.HARMLESS) & gguf_tokenizer.OFF


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(cache=tmp_path / "cache", offline=True)


def logits(module: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(ids).logits


IDS = torch.arange(18).view(2, 9)


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scale_linear": 4.0}, 4.0),
        ({"rope.scaling.factor": 0.0}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
    ],
)
def test_a_rope_factor_means_what_llama_cpp_makes_of_it(
    tmp_path: Path, config: Config, keys: dict[str, Any], factor: float | None
) -> None:
    model = tiny_llama()
    scaled = {"rope_type": "linear", "rope_theta": 5000.0, "factor": factor}
    expected = tiny_llama(**({} if factor is None else {"rope_parameters": scaled}))
    expected.load_state_dict(model.state_dict())
    write_gguf(tmp_path / "m.gguf", model, keys=keys)
    got = load(tmp_path / "m.gguf", config=config)
    assert torch.equal(logits(got.module, IDS), logits(expected, IDS))


def test_values_per_layer(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    add = gguf.GGUFWriter.add_uint32
    value: list[int] = []

    def add_array(self: Any, key: str, number: int) -> None:
        if key == "llama.attention.head_count_kv":
            self.add_array(key, value)
        else:
            add(self, key, number)

    monkeypatch.setattr(gguf.GGUFWriter, "add_uint32", add_array)
    value = [KV_HEADS, KV_HEADS]
    write_gguf(tmp_path / "same.gguf", model)
    got = load(tmp_path / "same.gguf", config=config)
    assert torch.equal(logits(got.module, IDS), logits(model, IDS))
    value = [KV_HEADS, 1]
    write_gguf(tmp_path / "other.gguf", model)
    with pytest.raises(UnsupportedError, match=r"head_count_kv=\[2, 1\], another value for some"):
        load(tmp_path / "other.gguf", config=config)


def test_a_vocabulary_of_another_size(tmp_path: Path, config: Config) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_llama(), keys={"vocab_size": SIZES["vocab_size"]})
    load(tmp_path / "m.gguf", config=config)
    write_gguf(tmp_path / "n.gguf", tiny_llama(), keys={"vocab_size": 99})
    with pytest.raises(WeightFormatError, match=r"vocab_size=99, but .* has 64 rows"):
        load(tmp_path / "n.gguf", config=config)
