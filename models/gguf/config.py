"""From GGUF metadata to a Hugging Face configuration and tensor names.

Supported architectures: llama (Llama, Mistral, SmolLM...), qwen2, qwen3; dense decoder layers with
plain or linearly scaled RoPE. What the metadata asks for beyond that (experts, YaRN, rope factor
tensors, partial rotation, another architecture, and every key that `gguf_keys` does not know)
raises UnsupportedError: a model that ran but computed something else would be worse.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gguf import MODEL_ARCH, get_tensor_name_map
from transformers import AutoConfig, PretrainedConfig

from graphopt.errors import UnsupportedError, WeightFormatError
from graphopt.models.gguf.file import GgufFile
from graphopt.models.gguf.keys import check_keys, uniform
from graphopt.models.gguf.schema import check_sizes
from graphopt.models.schema import one_line

# Control tokens that end a turn or a document in the model families above. Files name only one of
# them as eos; llama.cpp stops at all of these, and so do we.
_END_TEXTS = frozenset(
    {
        *("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "<|eom_id|>"),
        *("<end_of_turn>", "<end_of_utterance>", "<EOT>", "[EOT]", "<｜end▁of▁sentence｜>"),
    }
)
# Some converters mark an end token as one that the user added.
_CONTROL_TYPES = (3, 4)


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one GGUF architecture differs from the others.

    model_type: the Hugging Face name.
    permuted: llama.cpp interleaved the rotary halves of the q and k rows.
    """

    gguf: MODEL_ARCH
    model_type: str
    permuted: bool


ARCHITECTURES = {
    "llama": Architecture(MODEL_ARCH.LLAMA, "llama", permuted=True),
    "qwen2": Architecture(MODEL_ARCH.QWEN2, "qwen2", permuted=False),
    "qwen3": Architecture(MODEL_ARCH.QWEN3, "qwen3", permuted=False),
}


def architecture_of(file: GgufFile) -> Architecture:
    """The file's architecture; raises UnsupportedError when it is not in `ARCHITECTURES`."""
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{file.path} has GGUF architecture {name!r}; supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def build_config(file: GgufFile) -> tuple[PretrainedConfig, tuple[str, ...]]:
    """The Hugging Face configuration, and what a user should know of keys that are not in it.

    Raises UnsupportedError and WeightFormatError; the sizes are those of the file's tensors.
    """
    meta = _Metadata(file)
    architecture = architecture_of(file)
    _refuse_what_is_not_modelled(file, meta)
    notes = check_keys(file.path, file.metadata, file.metadata["general.architecture"])
    hidden, heads = meta["embedding_length"], meta["attention.head_count"]
    kv_heads = meta.get("attention.head_count_kv", heads)
    head_dim = meta.get("attention.key_length", meta.get("rope.dimension_count", hidden // heads))
    if meta.get("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedError(
            f"{file.path} rotates only {meta['rope.dimension_count']} of {head_dim} columns of a "
            "head; only full rotation is supported"
        )
    rows = _vocabulary_size(file, meta)
    check_sizes(
        file,
        {
            **{"hidden": hidden, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim},
            **{"feed_forward": meta["feed_forward_length"], "blocks": meta["block_count"]},
        },
    )
    pad = file.metadata.get("tokenizer.ggml.padding_token_id")
    settings: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": meta["feed_forward_length"],
        "num_hidden_layers": meta["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": meta["context_length"],
        "rms_norm_eps": meta["attention.layer_norm_rms_epsilon"],
        "rope_parameters": _rope_parameters(meta),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
        # Nothing reads it; some files name one that they do not have.
        "pad_token_id": pad if pad is not None and pad < rows else None,
    }
    if architecture.model_type in ("llama", "qwen3"):
        settings["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if architecture.model_type == "llama":
        settings["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    try:
        return AutoConfig.for_model(architecture.model_type, **settings), notes
    # The configuration class has checks of its own.
    except Exception as error:
        raise UnsupportedError(
            f"{file.path} has metadata that transformers does not take: {one_line(error)}"
        ) from error


def gguf_names(file: GgufFile, parameters: Iterable[str]) -> dict[str, str]:
    """Hugging Face parameter name -> name of the file's tensor that holds it.

    Raises WeightFormatError when a parameter has no tensor or a tensor no parameter, naming them.
    """
    blocks = _Metadata(file)["block_count"]
    table = get_tensor_name_map(architecture_of(file).gguf, blocks)
    names: dict[str, str] = {}
    missing: list[str] = []
    for parameter in parameters:
        name = table.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None or name not in file.tensors:
            missing.append(f"{parameter} ({name})")
        else:
            names[parameter] = name
    unexpected = sorted(set(file.tensors) - set(names.values()))
    if missing or unexpected:
        raise WeightFormatError(
            f"{file.path} does not fit its own metadata: missing {missing or 'nothing'}, "
            f"unexpected {unexpected or 'nothing'}"
        )
    return names


def end_token_ids(file: GgufFile) -> tuple[int, ...]:
    """Sorted ids of all tokens that end generation: eos, eot, eom and known end-of-text tokens."""
    metadata = file.metadata
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = {metadata[f"tokenizer.ggml.{key}"] for key in keys if f"tokenizer.ggml.{key}" in metadata}
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    types = metadata.get("tokenizer.ggml.token_type", [])
    ids.update(
        index
        for index, (token, type_) in enumerate(zip(tokens, types, strict=False))
        if type_ in _CONTROL_TYPES and token in _END_TEXTS
    )
    return tuple(sorted(ids))


class _Metadata:
    """The keys of the file's architecture, without their prefix."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.path = file.path
        self._prefix = file.metadata.get("general.architecture")

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise WeightFormatError(f"{self.path} lacks the key {self._prefix}.{key}")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        name = f"{self._prefix}.{key}"
        return uniform(self.path, name, self._file.metadata.get(name, default))


def _refuse_what_is_not_modelled(file: GgufFile, meta: _Metadata) -> None:
    default_width = meta["embedding_length"] // meta["attention.head_count"]
    key_width = meta.get("attention.key_length", default_width)
    value_width = meta.get("attention.value_length", default_width)
    refusals = {
        "a mixture of experts": meta.get("expert_count", 0) > 0,
        "rope factor tensors (rope_freqs.weight, used from Llama 3.1 on)": (
            "rope_freqs.weight" in file.tensors
        ),
        "attention value heads of another width than the keys": value_width != key_width,
    }
    for feature, present in refusals.items():
        if present:
            raise UnsupportedError(
                f"{file.path} uses {feature}, which the GGUF reader does not map; load the model's "
                "safetensors folder or hub name instead"
            )


def _rope_parameters(meta: _Metadata) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": meta.get("rope.freq_base", 10000.0),
    }
    # As in llama.cpp: a factor without a type scales linearly, and 0 stands for none.
    factor = meta.get("rope.scaling.factor", meta.get("rope.scale_linear", 0.0)) or 1.0
    scaling = meta.get("rope.scaling.type", "linear" if factor != 1.0 else "none")
    if scaling == "linear":
        parameters |= {"rope_type": "linear", "factor": factor}
    elif scaling != "none":
        raise UnsupportedError(
            f"{meta.path} has rope.scaling.type={scaling!r}; none and linear are read"
        )
    return parameters


def _vocabulary_size(file: GgufFile, meta: _Metadata) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise WeightFormatError(f"{file.path} lacks the tensor token_embd.weight")
    rows = embedding.shape[0]
    stated = meta.get("vocab_size", rows)
    if stated != rows:
        raise WeightFormatError(
            f"{file.path} says vocab_size={stated!r}, but token_embd.weight has {rows} rows"
        )
    tokens = len(file.metadata.get("tokenizer.ggml.tokens", []))
    if tokens > rows:
        raise WeightFormatError(
            f"{file.path} has {tokens} tokens, but token_embd.weight has {rows} rows"
        )
    return rows
