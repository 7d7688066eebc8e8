"""SmolLM2-135M-Instruct, 4-bit, as every user gets it."""

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from graphopt.capture.source import ModelSource
from graphopt.config import Config
from graphopt.models import load
from graphopt.models.builtin import fetch_builtin
from graphopt.models.gguf.blocks import unpack_blocks
from graphopt.models.gguf.file import open_gguf

pytestmark = pytest.mark.real_model
NAME = "smollm2-135m"


@pytest.fixture(scope="module")
def path() -> Path:
    return fetch_builtin(NAME, Config.from_environment())


@pytest.fixture(scope="module")
def packed() -> ModelSource:
    return load(NAME, weights="packed")


@pytest.fixture(scope="module")
def dense() -> ModelSource:
    return load(NAME)


def test_dense_logits_equal_transformers(path: Path, dense: ModelSource) -> None:
    pytest.importorskip("accelerate", reason="transformers reads GGUF only with accelerate")
    oracle = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
    ).eval()
    ids = torch.randint(0, 49152, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(dense.module(ids).logits, oracle(ids).logits, rtol=0, atol=1e-5)
    for name, buffer in oracle.named_buffers():
        assert torch.equal(dense.module.get_buffer(name), buffer), name


def test_packed_is_the_file(path: Path, packed: ModelSource) -> None:
    """All 211 matrices: dequantized bitwise like gguf's own code, and back to the file's bytes."""
    file = open_gguf(path)
    config = packed.module.config
    stems = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    seen = {"lm_head.weight", "model.embed_tokens.weight"}
    for tensor in file.tensors.values():
        if tensor.type == gguf.GGMLQuantizationType.F32:
            continue
        raw = file.read(tensor)
        heads = None
        if tensor.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        else:
            _, layer, leaf, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{stems[leaf]}.weight"
            heads = {
                "attn_q": config.num_attention_heads,
                "attn_k": config.num_key_value_heads,
            }.get(leaf)
        if heads is not None:
            raw = raw.reshape(heads, -1, 2, raw.shape[-1]).swapaxes(1, 2).reshape(raw.shape)
        weight = packed.packed[name]
        expected = gguf.quants.dequantize(raw, tensor.type)
        assert weight.dequantize().numpy().tobytes() == expected.tobytes(), name
        np.testing.assert_array_equal(unpack_blocks(weight), raw, err_msg=name)
        seen.add(name)
    assert set(packed.packed) == seen
    assert len(seen) == 212


def test_packed_module(packed: ModelSource, dense: ModelSource) -> None:
    assert packed.packed["lm_head.weight"] is packed.packed["model.embed_tokens.weight"]
    for name, parameter in packed.module.named_parameters():
        assert parameter.is_meta == (name in packed.packed), name
    for name, buffer in packed.module.named_buffers():
        assert torch.equal(buffer, dense.module.get_buffer(name)), name


def test_tokenizer(dense: ModelSource) -> None:
    tokenizer = dense.tokenizer
    for text in ["Hello  world!\n\tx = 12345", "I'm sure, don't", "naïve café 日本語 😀", ""]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ends = [tokenizer.decode([token]) for token in dense.eos_token_ids]
    assert ends == ["<|endoftext|>", "<|im_end|>"]


def test_it_speaks_english(dense: ModelSource) -> None:
    ids = dense.tokenizer.encode("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        token = dense.module(ids).logits[0, -1].argmax()
    assert dense.tokenizer.decode([int(token)]) == " Paris"


def test_packed_memory_stays_near_the_files_size(path: Path) -> None:
    """Peak growth while loading, in a process of its own: the dense model would add 540 MB."""
    program = """
import resource, sys
from graphopt.models import load
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
source = load("smollm2-135m", weights="packed")
sys.stdout.write(str((peak() - before) * 1024))
"""
    load(NAME, weights="packed")  # the tokenizer is converted by now
    grown = int(
        subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, text=True
        ).stdout
    )
    assert grown < 2.5 * path.stat().st_size
