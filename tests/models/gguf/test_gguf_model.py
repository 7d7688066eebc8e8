from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from helpers.gguf_samples import HEADS, SIZES, Q, randomize, tiny_llama, write_gguf
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from graphopt.config import Config
from graphopt.errors import UnsupportedError, WeightFormatError
from graphopt.models import load
from graphopt.models.gguf.blocks import unpack_blocks


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(cache=tmp_path / "cache", offline=True)


def ids(length: int = 9) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (2, length))


def logits(module: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids).logits


def with_values(model: Any, values: dict[str, np.ndarray]) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(values[name]))
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weights", ["dense", "packed"])
def test_float_file_gives_the_model_it_was_made_from(
    tmp_path: Path, config: Config, tied: bool, weights: str
) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    write_gguf(tmp_path / "m.gguf", model)
    source = load(tmp_path / "m.gguf", weights=weights, config=config)
    assert not source.packed
    assert not source.module.training
    assert source.name == "m"
    assert (source.module.lm_head.weight is source.module.model.embed_tokens.weight) == tied
    batch = ids()
    assert torch.equal(logits(source.module, batch), logits(model, batch))


@pytest.mark.parametrize(
    ("architecture", "make"),
    [
        ("qwen2", lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES))),
        ("qwen3", lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES))),
    ],
)
def test_other_architectures(
    tmp_path: Path, config: Config, architecture: str, make: Callable[[], Any]
) -> None:
    model = randomize(make())
    write_gguf(tmp_path / "m.gguf", model, architecture=architecture)
    source = load(tmp_path / "m.gguf", config=config)
    assert source.module.config.model_type == architecture
    batch = ids()
    assert torch.equal(logits(source.module, batch), logits(model, batch))


def test_biases_are_permuted_with_their_rows(tmp_path: Path, config: Config) -> None:
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    write_gguf(tmp_path / "m.gguf", model)
    batch = ids()
    got = logits(load(tmp_path / "m.gguf", config=config).module, batch)
    assert torch.equal(got, logits(model, batch))


def test_linear_rope_scaling(tmp_path: Path, config: Config) -> None:
    scaled = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
    model = tiny_llama(rope_parameters=scaled)
    keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "m.gguf", model, keys=keys)
    batch = ids()
    got = logits(load(tmp_path / "m.gguf", config=config).module, batch)
    assert torch.equal(got, logits(model, batch))
    assert not torch.equal(got, logits(with_values(tiny_llama(), _values(model)), batch))


def _values(model: Any) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in model.named_parameters()}


@pytest.mark.parametrize("type_", [Q.Q4_0, Q.Q4_1, Q.Q8_0, Q.Q5_0, Q.F16, Q.BF16])
def test_dense_equals_dequantized_blocks(tmp_path: Path, config: Config, type_: Q) -> None:
    model = tiny_llama()
    values = write_gguf(tmp_path / "m.gguf", model, quantize=lambda name: type_)
    source = load(tmp_path / "m.gguf", config=config)
    for name, parameter in source.module.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), values[name], err_msg=name)
    batch = ids()
    assert torch.equal(logits(source.module, batch), logits(with_values(model, values), batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dense_dtype(tmp_path: Path, config: Config, dtype: torch.dtype) -> None:
    values = write_gguf(tmp_path / "m.gguf", tiny_llama(), quantize=lambda name: Q.Q4_1)
    source = load(tmp_path / "m.gguf", dtype=dtype, config=config)
    assert source.dtype == dtype
    for name, parameter in source.module.named_parameters():
        assert torch.equal(parameter, torch.from_numpy(values[name]).to(dtype)), name
    assert source.module.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("type_", [Q.Q4_0, Q.Q4_1, Q.Q8_0])
def test_packed_weights_are_the_files_blocks(tmp_path: Path, config: Config, type_: Q) -> None:
    path = tmp_path / "m.gguf"
    values = write_gguf(path, tiny_llama(), quantize=lambda name: type_)
    source = load(path, weights="packed", config=config)
    matrices = {name for name, value in values.items() if value.ndim == 2}
    assert set(source.packed) == matrices
    for name, weight in source.packed.items():
        assert weight.source_format == type_.name
        np.testing.assert_array_equal(weight.dequantize().numpy(), values[name], err_msg=name)
    for name, parameter in source.module.named_parameters():
        assert parameter.is_meta == (name in matrices), name
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    again = unpack_blocks(source.packed["model.layers.1.mlp.down_proj.weight"])
    np.testing.assert_array_equal(again, stored["blk.1.ffn_down.weight"])


def test_packed_equals_dense_once_filled_in(tmp_path: Path, config: Config) -> None:
    """Norms and buffers of the packed module are real: filling in its matrices completes it."""
    model = tiny_llama()
    write_gguf(tmp_path / "m.gguf", model, quantize=lambda name: Q.Q4_1)
    packed = load(tmp_path / "m.gguf", weights="packed", config=config)
    dense = load(tmp_path / "m.gguf", config=config)
    state = {name: weight.dequantize() for name, weight in packed.packed.items()}
    packed.module.load_state_dict(state, strict=False, assign=True)
    for name, buffer in packed.module.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name
    batch = ids()
    assert torch.equal(logits(packed.module, batch), logits(dense.module, batch))


def test_packed_module_fails_loudly_when_run(tmp_path: Path, config: Config) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_llama(), quantize=lambda name: Q.Q4_1)
    source = load(tmp_path / "m.gguf", weights="packed", config=config)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        logits(source.module, ids())


def test_tied_packed_embedding_is_one_object_under_two_names(
    tmp_path: Path, config: Config
) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    write_gguf(tmp_path / "m.gguf", model, quantize=lambda name: Q.Q8_0)
    source = load(tmp_path / "m.gguf", weights="packed", config=config)
    assert source.packed["lm_head.weight"] is source.packed["model.embed_tokens.weight"]
    assert source.module.lm_head.weight is source.module.model.embed_tokens.weight


def test_mixed_file_keeps_what_can_stay_packed(tmp_path: Path, config: Config) -> None:
    types = {"blk.0.attn_v.weight": Q.Q5_1, "token_embd.weight": Q.F16}
    values = write_gguf(
        tmp_path / "m.gguf", tiny_llama(), quantize=lambda name: types.get(name, Q.Q4_0)
    )
    source = load(tmp_path / "m.gguf", weights="packed", dtype=torch.bfloat16, config=config)
    for name in ("model.layers.0.self_attn.v_proj.weight", "model.embed_tokens.weight"):
        assert name not in source.packed
        parameter = source.module.get_parameter(name)
        assert torch.equal(parameter, torch.from_numpy(values[name]).bfloat16())
    assert "model.layers.1.self_attn.v_proj.weight" in source.packed


def test_k_quants_are_dequantized(tmp_path: Path, config: Config) -> None:
    """The gguf package cannot write Q6_K, so its blocks are made of random bytes here."""
    shape = (SIZES["hidden_size"], SIZES["intermediate_size"])
    raw = np.random.randint(0, 256, (shape[0], 210), dtype=np.uint8)
    raw[:, -2:] = np.random.rand(shape[0], 1).astype(np.float16).view(np.uint8)
    path = tmp_path / "m.gguf"
    original = gguf.GGUFWriter.add_tensor

    def add_tensor(self: Any, name: str, array: np.ndarray, **options: Any) -> None:
        if name == "blk.0.ffn_down.weight":
            return original(self, name, raw, raw_dtype=Q.Q6_K)
        return original(self, name, array, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", add_tensor)
        write_gguf(path, tiny_llama())
    expected = gguf.quants.dequantize(raw, Q.Q6_K)
    for weights in ("dense", "packed"):
        source = load(path, weights=weights, config=config)
        got = source.module.model.layers[0].mlp.down_proj.weight.detach().numpy()
        np.testing.assert_array_equal(got, expected)


def test_end_tokens(tmp_path: Path, config: Config) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_llama(), tokenizer=True)
    assert load(tmp_path / "m.gguf", config=config).eos_token_ids == (0, 2)
    write_gguf(tmp_path / "n.gguf", tiny_llama())
    assert load(tmp_path / "n.gguf", config=config).eos_token_ids == ()


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path, config: Config) -> None:
    extra = {"blk.1.ffn_up.weight": None, "blk.0.extra.weight": np.zeros(3, np.float32)}
    write_gguf(tmp_path / "m.gguf", tiny_llama(), replace=extra)
    with pytest.raises(WeightFormatError) as error:
        load(tmp_path / "m.gguf", config=config)
    assert "missing ['model.layers.1.mlp.up_proj.weight (blk.1.ffn_up.weight)']" in str(error.value)
    assert "unexpected ['blk.0.extra.weight']" in str(error.value)


def test_wrong_shape_is_named(tmp_path: Path, config: Config) -> None:
    wrong = {"blk.1.ffn_up.weight": np.zeros((4, 32), np.float32)}
    write_gguf(tmp_path / "m.gguf", tiny_llama(), replace=wrong)
    with pytest.raises(WeightFormatError, match=r"blk\.1\.ffn_up\.weight.*\(4, 32\).*\(256, 64\)"):
        load(tmp_path / "m.gguf", config=config)


def test_missing_embedding_and_metadata(tmp_path: Path, config: Config) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_llama(), replace={"token_embd.weight": None})
    with pytest.raises(WeightFormatError, match=r"token_embd\.weight"):
        load(tmp_path / "m.gguf", config=config)
    model = tiny_llama()
    data = write_gguf(tmp_path / "n.gguf", model) and (tmp_path / "n.gguf").read_bytes()
    (tmp_path / "n.gguf").write_bytes(data.replace(b"embedding_length", b"embedding_LENGTH"))
    with pytest.raises(WeightFormatError, match=r"llama\.embedding_length"):
        load(tmp_path / "n.gguf", config=config)


@pytest.mark.parametrize(
    ("keys", "replace", "text"),
    [
        ({"expert_count": 8}, {}, "mixture of experts"),
        ({}, {"rope_freqs.weight": np.ones(8, np.float32)}, r"rope_freqs\.weight"),
        ({"rope.scaling.type": "yarn"}, {}, "'yarn'.*none and linear"),
        ({"rope.dimension_count": 8}, {}, "only 8 of 16 columns"),
        ({"attention.value_length": 32}, {}, "value heads"),
    ],
)
def test_unsupported_features_are_refused(
    tmp_path: Path, config: Config, keys: Any, replace: Any, text: str
) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_llama(), keys=keys, replace=replace)
    with pytest.raises(UnsupportedError, match=text):
        load(tmp_path / "m.gguf", config=config)


def test_unsupported_architecture(tmp_path: Path, config: Config) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_llama(), architecture="mamba")
    with pytest.raises(UnsupportedError, match="'mamba'; supported: llama, qwen2, qwen3"):
        load(tmp_path / "m.gguf", config=config)


def test_old_files_without_optional_keys(tmp_path: Path, config: Config) -> None:
    """head_dim and the number of kv heads have defaults in the format."""
    model = tiny_llama(num_key_value_heads=HEADS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("helpers.gguf_samples.KV_HEADS", HEADS)
        optional = ("key_length", "value_length", "head_count_kv")
        left_out = dict.fromkeys(f"attention.{key}" for key in optional)
        write_gguf(tmp_path / "m.gguf", model, keys=left_out)
    batch = ids()
    got = logits(load(tmp_path / "m.gguf", config=config).module, batch)
    assert torch.equal(got, logits(model, batch))
