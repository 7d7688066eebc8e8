"""The generation configuration of a Hugging Face model: what `generate` does when nobody says
otherwise.

Rule: a setting is applied as a default, known to be without effect here, or told by name. Applied
are those that the runtime has, with transformers' own meaning: sampling (do_sample, temperature,
top_k, top_p, min_p; transformers' top_k of 50 where do_sample is set without one), the penalties
and bans of `runtime.logits_processors`, and max_new_tokens. Whatever else differs from
transformers' default is in the notes, with its value: beams, contrastive and other searches,
forced tokens, guidance, watermarks, and keys that transformers itself does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphopt.errors import WeightFormatError
from graphopt.models.schema import TOKEN, short

# Under other names in the runtime, or with other containers.
_APPLIED = {
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "bad_words_ids": "bad_words_ids",
    "min_new_tokens": "min_tokens",
    "suppress_tokens": "suppress_tokens",
    "begin_suppress_tokens": "begin_suppress_tokens",
    "max_new_tokens": "max_tokens",
}
_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
"""Applied with do_sample; the values are transformers' own defaults then."""
_NEUTRAL: dict[str, Any] = {
    **_SAMPLING,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "typical_p": 1.0,
    "guidance_scale": 1,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
}
"""Values that change nothing; for every other setting None, False, 0 and empty ones do not."""
_WITHOUT_EFFECT = frozenset(
    {
        # Read elsewhere: end tokens by `end_token_ids`, do_sample below.
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "do_sample"),
        # How it is computed or returned, not what.
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory"),
        *("compile_config", "disable_compile", "prefill_chunk_size", "return_dict_in_generate"),
        *("continuous_batching_config", "output_attentions", "output_hidden_states"),
        *("output_scores", "output_logits", "return_legacy_cache", "trust_remote_code"),
        *("transformers_version", "_from_model_config", "_commit_hash", "_name_or_path"),
        # A distribution is normalised in any case, and values that are no numbers are an error.
        *("renormalize_logits", "remove_invalid_values"),
        # Drafts of speculative decoding, which change no text.
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "use_mtp"),
        *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind"),
        *("target_lookbehind", "prompt_lookup_num_tokens", "max_matching_ngram_size"),
        *("assistant_ensemble_weight", "speculation_type"),
    }
)
_OF_BEAMS = frozenset({"length_penalty", "early_stopping", "diversity_penalty", "num_beam_groups"})


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a generation configuration asks for.

    settings: fields of the runtime's sampling settings, in plain values. notes: one sentence about
    those that are applied, and one about those that are not.
    """

    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def generation_defaults(module: Any) -> GenerationDefaults:
    """Of a Hugging Face module; empty for others.

    The values are not checked: the runtime's settings do that.
    """
    stated = _stated(getattr(module, "generation_config", None))
    applied = {name: value for name, value in stated.items() if name in _APPLIED}
    settings = {_APPLIED[name]: value for name, value in applied.items()}
    if stated.get("do_sample") is True:
        chosen = {name: stated.get(name, default) for name, default in _SAMPLING.items()}
        settings |= chosen
        applied = {"do_sample": True, **chosen, **applied}
    other = {name: value for name, value in stated.items() if name not in applied}
    notes = []
    if applied:
        notes.append(
            f"generation_config: {_listed(applied)}: defaults of generate, which its own arguments "
            "override; a SamplingParams replaces them all"
        )
    ignored = {name: value for name, value in other.items() if _changes_text(name, other)}
    if ignored:
        notes.append(f"generation_config: {_listed(ignored)}: not applied by generate")
    return GenerationDefaults(settings, tuple(notes))


def end_token_ids(module: Any) -> tuple[int, ...]:
    """Tokens that end a Hugging Face module's text, as its own `generate` takes them: those of the
    generation configuration, else of the configuration. Empty for other modules.

    Raises WeightFormatError for what is no token id.
    """
    for settings in ("generation_config", "config"):
        stated = getattr(getattr(module, settings, None), "eos_token_id", None)
        if stated is None:
            continue
        ids = list(stated) if isinstance(stated, (list, tuple)) else [stated]
        if not all(map(TOKEN.allows, ids)):
            raise WeightFormatError(
                f"the {settings} of {type(module).__name__} has eos_token_id={short(stated)}; it "
                f"must be {TOKEN}, or a list of them"
            )
        return tuple(sorted(set(ids)))
    return ()


def _stated(config: Any) -> dict[str, Any]:
    """What the configuration says beyond transformers' defaults."""
    if config is None or not hasattr(config, "to_diff_dict"):
        return {}
    return {
        name: value
        for name, value in config.to_diff_dict().items()
        if (value or (name in _SAMPLING and value is not None)) and value != _NEUTRAL.get(name)
    }


def _changes_text(name: str, stated: Mapping[str, Any]) -> bool:
    if name in _OF_BEAMS:
        return "num_beams" in stated
    return name not in _WITHOUT_EFFECT


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in settings.items())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({len(value)} entries)"
