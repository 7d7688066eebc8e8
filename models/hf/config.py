"""What a config.json says beyond what the transformers class reads.

Rule: a key that the class (its fields, its configuration and modeling source) reads is honoured; a
key of `_MATTERS`, which changes what other models compute, is refused by name unless its value
switches it off; code and quantization of its own are refused by name; rotary settings that
transformers does not know are refused by name; whatever else nobody reads is told.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from graphopt.errors import UnsupportedError

_MATTERS = re.compile(
    r"alibi|use_alibi|.*softcap(ping)?|logit_scale|logits_scaling|scale_(emb|depth|attn)|"
    r"dim_model_base|(embedding|residual|attention|logits)_(multiplier|scale)|mup_.*|use_mup|"
    r"query_pre_attn_scalar|(is_)?causal|position_embedding_type|(use_)?bidirectional(_attention)?|"
    r"sliding_window(_pattern)?|use_sliding_window|attention_chunk_size|clip_qkv|"
    r"attn_temperature_tuning|no_rope_layers?(_interval)?|partial_rotary_factor|rotary_pct|"
    r"(use_)?qk_(layer)?norm|num_(local_)?experts.*|n_(routed|shared)_experts|moe_.*|"
    r"rope_(scaling|parameters|theta)|parallel_attn|use_parallel_residual|"
    r"quantization(_config)?|compression_config|attention_sinks?|swiglu_limit|layer_types"
)
# Beside what is false, zero or empty.
_OFF: Mapping[str, tuple[Any, ...]] = {
    "causal": (None, True),
    "is_causal": (None, True),
    "position_embedding_type": ("absolute",),
}
_SCALE = re.compile(r".*(scale|scaling|multiplier|scale_emb|factor|rotary_pct)")
_HARMLESS = re.compile(
    r"_.*|architectures|auto_map|model_type|transformers_version|torch_dtype|dtype|use_cache|"
    r"tokenizer_class|task_specific_params|finetuning_task|pretraining_tp|gradient_checkpointing|"
    r"model_max_length|max_sequence_length|tokenizer_padding_side|attn_implementation|"
    r"use_flash_attn.*|transformers\.js_config|unsloth_.*|.*_?(dropout|pdrop)(_prob)?|"
    r"(bos|eos|pad|sep|cls|mask|unk|decoder_start)_token_id|initializer_.*|summary_.*|output_.*|return_.*|torchscript|pruned_heads|n_ctx|use_bfloat16"
)


def check_config(
    file: Path, settings: Mapping[str, Any], config: PretrainedConfig, model_class: Any
) -> tuple[str, ...]:
    """Refuse what changes the model and is not read; returns what a user should know of the rest.

    settings: the JSON object of `file`; config, model_class: what transformers made of it. Raises
    UnsupportedError naming the key, its value and the file.
    """
    _check_own_code(file, settings, model_class)
    source = _source(type(config), model_class)
    _check_rope(file, config, source)
    fields = {field.name for field in dataclasses.fields(config)}
    fields |= {*config.attribute_map, *config.attribute_map.values()}
    if "rope_parameters" in fields:
        # Their names before transformers 5.
        fields |= {"rope_theta", "rope_scaling", "partial_rotary_factor"}
    if "create_causal_mask" in source:
        # transformers' masks read it.
        fields.add("is_causal")
    if not (file.parent / "generation_config.json").is_file():
        # Older files keep the settings of generation here, and transformers reads them.
        fields |= vars(GenerationConfig()).keys()
    unread = {
        name: value
        for name, value in settings.items()
        if name not in fields and not re.search(rf"\b{re.escape(name)}\b", source)
    }
    for name, value in unread.items():
        if _MATTERS.fullmatch(name) and not _is_off(name, value):
            raise UnsupportedError(
                f"{file} has {name}={value!r}, which {model_class.__name__} does not read although "
                "it changes what a model computes; remove it if the model was trained without, or "
                "build the module yourself and pass it to graphopt.compile"
            )
    told = {
        name: value
        for name, value in unread.items()
        if value
        and not _HARMLESS.fullmatch(name)
        and not _MATTERS.fullmatch(name)
        # Settings of generation are in the generation configuration by now.
        and not hasattr(PretrainedConfig(), name)
    }
    if not told:
        return ()
    listed = ", ".join(f"{name}={value!r}"[:80] for name, value in told.items())
    return (f"{file.name}: {listed}: not read by {model_class.__name__}",)


def check_quantization(file: Path, settings: Mapping[str, Any]) -> None:
    """Raises UnsupportedError for weights in a quantized form of some library."""
    for name in ("quantization_config", "compression_config", "quantization"):
        stated = settings.get(name)
        if stated:
            kind = stated.get("quant_method", stated) if isinstance(stated, dict) else stated
            raise UnsupportedError(
                f"{file} has {name} ({kind!r}): weights in that form are not read; load the "
                "unquantized model, or a GGUF file, whose blocks can stay packed"
            )


def _check_own_code(file: Path, settings: Mapping[str, Any], model_class: Any) -> None:
    code = settings.get("auto_map")
    named = settings.get("architectures") or [model_class.__name__]
    models = [k for k in code if k.startswith("AutoModel")] if isinstance(code, dict) else []
    is_native = named[0] == model_class.__name__
    if models and not is_native:
        raise UnsupportedError(
            f"{file} wants code of its own (auto_map {code!r}) for {named[0]}, which transformers "
            "does not have; graphopt never sets trust_remote_code. Build the module yourself and "
            "pass it to graphopt.compile"
        )


def _check_rope(file: Path, config: PretrainedConfig, source: str) -> None:
    """transformers warns of rotary settings that it leaves out, or does not even do that; here they
    are an error."""
    validate = getattr(config, "validate_rope", None)
    if validate is None:
        return
    with _messages("transformers.modeling_rope_utils") as messages:
        try:
            validate()
        # Checks of values that the class has accepted already.
        except Exception as error:
            messages.append(str(error))
    wrong = [text for text in messages if text.startswith(("Unrecognized", "Missing"))]
    stated = getattr(config, "rope_parameters", None) or {}
    # Only the model's own code computes the default frequencies.
    is_whole = stated.get("partial_rotary_factor", 1.0) == 1.0 or "partial_rotary" in source
    if stated.get("rope_type") == "default" and not is_whole:
        wrong.append("partial_rotary_factor")
    if wrong:
        raise UnsupportedError(
            f"{file} has rotary settings that transformers does not read: {wrong[0]} in {stated!r}"
        )


@contextmanager
def _messages(logger_name: str) -> Iterator[list[str]]:
    """What is logged inside under that name, and nowhere else."""
    found: list[str] = []
    logger = logging.getLogger(logger_name)

    def keep(record: logging.LogRecord) -> bool:
        found.append(record.getMessage())
        return False

    level = logger.level
    logger.addFilter(keep)
    logger.setLevel(logging.WARNING)
    try:
        yield found
    finally:
        logger.removeFilter(keep)
        logger.setLevel(level)


def _is_off(name: str, value: Any) -> bool:
    if name in _OFF:
        return value in _OFF[name]
    if name == "layer_types":
        return set(value) == {"full_attention"}
    is_one = isinstance(value, int | float) and not isinstance(value, bool) and value == 1
    return not value or (is_one and _SCALE.fullmatch(name) is not None)


def _source(*classes: Any) -> str:
    """The text of the modules of these classes and of what they inherit, within transformers, but
    for the common base classes, which mention the settings of all models."""
    modules = {
        base.__module__
        for cls in classes
        for base in inspect.getmro(cls)
        if base.__module__.startswith("transformers.models.")
    }
    return "\n".join(inspect.getsource(sys.modules[name]) for name in sorted(modules))
