"""Tiny GGUF files made in tests from tiny Hugging Face models, with llama.cpp's own conventions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Q
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh", "Ġ", "ab", "Ġa", "cd"]
MERGES = ["a b", "Ġ a", "c d"]
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": HEADS * HEAD_DIM,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
# Hugging Face's leaf modules -> GGUF's, written out so that gguf's own table is not the oracle.
LEAVES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tiny_llama(**overrides: Any) -> LlamaForCausalLM:
    """A random Llama whose norm weights are not all one."""
    return randomize(LlamaForCausalLM(LlamaConfig(**{**SIZES, **overrides})))


def randomize(model: PreTrainedModel) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1))
    return model.eval()


def gguf_name(name: str) -> str:
    """Hugging Face parameter name -> GGUF tensor name."""
    stem, _, suffix = name.rpartition(".")
    top = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    if stem in top:
        return f"{top[stem]}.{suffix}"
    _, _, layer, leaf = stem.split(".", 3)
    return f"blk.{layer}.{LEAVES[leaf]}.{suffix}"


def interleave(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """llama.cpp's conversion of q and k rows: halves of a head become neighbours."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    architecture: str = "llama",
    quantize: Callable[[str], Q] = lambda name: Q.F32,
    replace: Mapping[str, NDArray[Any] | None] | None = None,
    keys: Mapping[str, Any] | None = None,
    tokenizer: bool = False,
) -> dict[str, NDArray[np.float32]]:
    """Write `model` and return what each tensor dequantizes to, in Hugging Face's row order.

    quantize: block type of a matrix from its GGUF name. replace: GGUF tensors to put in place of
    the model's (None: leave out). keys: architecture-prefixed metadata to add or replace, or to
    leave out (None).
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    metadata = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "rope.dimension_count": HEAD_DIM,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        **(keys or {}),
    }
    for key, value in metadata.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add[type(value)](f"{architecture}.{key}", value)
    if tokenizer:
        _add_tokenizer(writer)
    permuted = {"attn_q.": HEADS, "attn_k.": KV_HEADS} if architecture == "llama" else {}
    expected = {}
    extra = dict(replace or {})
    for name, parameter in model.named_parameters():
        target = gguf_name(name)
        value = parameter.detach().numpy()
        heads = next((permuted[part] for part in permuted if part in target), None)
        stored = np.ascontiguousarray(value if heads is None else interleave(value, heads))
        type_ = quantize(target) if value.ndim == 2 else Q.F32
        blocks = gguf.quants.quantize(stored, type_)
        expected[name] = gguf.quants.dequantize(gguf.quants.quantize(value, type_), type_)
        if target not in extra:
            writer.add_tensor(target, blocks, raw_dtype=type_)
    for target, array in extra.items():
        if array is not None:
            writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
