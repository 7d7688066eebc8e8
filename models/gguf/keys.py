"""Which metadata keys of a GGUF file are read, which are known to change nothing, and what becomes
of the rest.

Rule: a key of the file's architecture is honoured (`HONOURED`), without effect on the
architectures that are read (`HARMLESS`), or it switches something on that is not modelled, and
then only values that switch it off are accepted (`NEUTRAL`, `SAME_AS`, and zero, false or empty for
`OFF`). Every other value, and every key that is in none of these tables, is refused with its name,
value and file. Values per layer (arrays) must be the same for all layers.

Keys outside the architecture: `general.*` describes the file, but for those in `GENERAL`;
`tokenizer.*` is read by `gguf_tokenizer`, `split.*` by `gguf_file`; namespaces in
`_OTHER_MODELS` belong to what is no decoder; keys of anybody else are told.

The names are those of the `gguf` package's `constants.Keys`; what a value means is what llama.cpp
makes of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from graphopt.errors import UnsupportedError, WeightFormatError
from graphopt.models.schema import short

HONOURED = frozenset(
    {
        *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
        *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
        *("attention.value_length", "attention.layer_norm_rms_epsilon"),
        *("rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor"),
        "rope.scale_linear",
    }
)
HARMLESS = frozenset(
    {
        # Of YaRN and longrope, which are refused by rope.scaling.type.
        *("rope.scaling.original_context_length", "rope.scaling.finetuned"),
    }
)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.output_scale": (0, 1),
    "attention.temperature_scale": (0, 1),
    "embedding_scale": (0, 1),
    "expert_group_scale": (0, 1),
    "expert_weights_scale": (0, 1),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (0, 1),
    "rope.scaling.yarn_beta_fast": (0, 32),
    "rope.scaling.yarn_beta_slow": (0, 1),
    "rope.scaling.yarn_ext_factor": (0, -1),
    # What llama.cpp's converters wrote for the interleaved rows that every llama file has.
    "tensor_data_layout": ("Meta AI original pth",),
}
SAME_AS: Mapping[str, str] = {
    "attention.key_length_mla": "attention.key_length",
    "attention.key_length_swa": "attention.key_length",
    "attention.layer_norm_epsilon": "attention.layer_norm_rms_epsilon",
    "attention.value_length_mla": "attention.value_length",
    "attention.value_length_swa": "attention.value_length",
    "embedding_length_out": "embedding_length",
    "features_length": "embedding_length",
    "rope.dimension_count_swa": "rope.dimension_count",
    "rope.freq_base_swa": "rope.freq_base",
}
"""Accepted when they say the same as another key."""
OFF = frozenset(
    {
        *("activation_sparsity_scale", "altup.active_idx", "altup.num_inputs"),
        *("attention.clamp_kqv", "attention.decay_lora_rank", "attention.gate_lora_rank"),
        *("attention.group_norm_epsilon", "attention.group_norm_groups"),
        *("attention.iclr_lora_rank", "attention.indexer.head_count"),
        *("attention.indexer.key_length", "attention.indexer.top_k", "attention.kv_lora_rank"),
        *("attention.max_alibi_bias", "attention.q_lora_rank", "attention.scale"),
        *("attention.relative_buckets_count", "attention.shared_kv_layers"),
        *("attention.sliding_window", "attention.sliding_window_pattern"),
        *("attention.temperature_length", "attention.value_residual_mix_lora_rank"),
        *("attn_logit_softcapping", "classifier.output_labels", "convnext.block_count"),
        *("convnext.embedding_length", "decoder_block_count", "decoder_start_token_id"),
        *("dense_2_feat_in", "dense_2_feat_out", "dense_3_feat_in", "dense_3_feat_out"),
        *("embedding_length_per_layer_input", "expert_chunk_feed_forward_length", "expert_count"),
        *("expert_feed_forward_length", "expert_gating_func", "expert_group_count"),
        *("expert_group_used_count", "expert_shared_count", "expert_shared_feed_forward_length"),
        *("expert_used_count", "expert_weights_norm", "experts_per_group"),
        *("final_logit_softcapping", "full_attention_interval", "interleave_moe_layer_step"),
        *("kda.head_dim", "leading_dense_block_count", "moe_every_n_layers", "moe_latent_size"),
        *("n_deepstack_layers", "nextn_predict_layers", "pooling_type", "posnet.block_count"),
        *("posnet.embedding_length", "rescale_every_n_layers", "rope.dimension_sections"),
        *("rope.scaling.yarn_log_multiplier", "router_logit_softcapping", "shortconv.l_cache"),
        *("ssm.conv_kernel", "ssm.dt_b_c_rms", "ssm.group_count", "ssm.inner_size"),
        *("ssm.state_size", "ssm.time_step_rank", "swiglu_clamp_exp", "swiglu_clamp_shexp"),
        *("swin_norm", "time_decay_extra_dim", "time_mix_extra_dim", "token_shift_count"),
        *("use_parallel_residual", "wkv.head_size"),
    }
)
GENERAL: Mapping[str, tuple[Any, ...]] = {
    "general.type": ("model",),
    "general.quantization_version": (2,),
}
"""Keys of the file as a whole that must have one of these values."""
_OTHER_MODELS = ("adapter.", "clip.", "diffusion.", "imatrix.", "xielu.")
_READ_ELSEWHERE = ("general.", "tokenizer.", "split.", "quantize.imatrix.")
_SAMPLING = "general.sampling."
_REMEDY = "load the model's safetensors folder or hub name instead"


def check_keys(path: Path, metadata: Mapping[str, Any], architecture: str) -> tuple[str, ...]:
    """Refuse what is not modelled; returns what a user should know of the other keys.

    Raises UnsupportedError naming the first key, its value and the file.
    """
    prefix = f"{architecture}."
    for key, value in metadata.items():
        if key in GENERAL and value not in GENERAL[key]:
            wanted = " or ".join(map(repr, GENERAL[key]))
            raise UnsupportedError(f"{path} has {key}={value!r}; {wanted} is read")
        if key.startswith(_OTHER_MODELS):
            raise UnsupportedError(
                f"{path} has {key}={short(value)}, which belongs to no plain decoder; the GGUF "
                f"reader does not map it: {_REMEDY}"
            )
        if key.startswith(prefix):
            _check(path, key, metadata, prefix)
    return tuple(_told(path, metadata, prefix))


def uniform(path: Path, key: str, value: Any) -> Any:
    """The value of a key that may be given per layer.

    Raises UnsupportedError when the layers differ, WeightFormatError for an empty list.
    """
    if not isinstance(value, list):
        return value
    if not value:
        raise WeightFormatError(f"{path} has an empty list for {key}")
    if any(item != value[0] for item in value):
        raise UnsupportedError(
            f"{path} has {key}={short(value)}, another value for some layers; the GGUF reader "
            f"builds layers that are alike: {_REMEDY}"
        )
    return value[0]


def _check(path: Path, key: str, metadata: Mapping[str, Any], prefix: str) -> None:
    name, value = key.removeprefix(prefix), metadata[key]
    if name in HONOURED or name in HARMLESS:
        return
    items = value if isinstance(value, list) else [value]
    if name in NEUTRAL:
        legal = all(item in NEUTRAL[name] for item in items)
    elif name in SAME_AS:
        other = metadata.get(prefix + SAME_AS[name])
        legal = value == other or not any(items)
    else:
        legal = name in OFF and not any(items)
    if name == "attention.scale" and not legal:
        legal = _is_default_scale(value, metadata, prefix)
    if not legal:
        known = name in NEUTRAL or name in SAME_AS or name in OFF
        raise UnsupportedError(
            f"{path} has {key}={short(value)}, which "
            + ("changes what the model computes and is" if known else "is a key that is")
            + f" not mapped by the GGUF reader: {_REMEDY}"
        )


def _is_default_scale(value: Any, metadata: Mapping[str, Any], prefix: str) -> bool:
    """Whether the scores are divided by the root of the head's width, as they are without it."""
    heads = metadata.get(f"{prefix}attention.head_count")
    hidden = metadata.get(f"{prefix}embedding_length")
    width = metadata.get(f"{prefix}attention.key_length")
    if width is None and isinstance(hidden, int) and isinstance(heads, int) and heads:
        width = hidden // heads
    is_number = isinstance(value, float) and isinstance(width, int) and width > 0
    return is_number and abs(value * value * width - 1.0) < 1e-5


def _told(path: Path, metadata: Mapping[str, Any], prefix: str) -> Iterator[str]:
    sampling = {k: v for k, v in metadata.items() if k.startswith(_SAMPLING)}
    if sampling:
        listed = ", ".join(f"{key}={short(value)}" for key, value in sampling.items())
        yield f"{path.name}: {listed}: not applied by generate; pass them as its arguments"
    other = [k for k in metadata if not k.startswith((prefix, *_READ_ELSEWHERE))]
    if other:
        yield f"{path.name}: keys that nothing reads: {', '.join(sorted(other))}"
