"""What the settings of a Hugging Face folder may be: types and ranges, by the name of the setting.

Checked on the JSON, before a class of transformers sees it: some of them make a list of as many
entries as a number says. A configuration has names of a hundred architectures, so a rule stands for
every name of its kind, at any depth (settings of a part, rotary settings). A setting that is null
is one that was not made. How much memory the numbers may ask for is for `hf_weights` to say, which
knows what the files hold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from graphopt.errors import WeightFormatError
from graphopt.models.schema import (
    COUNT,
    EPSILON,
    FLAG,
    POSITIVE,
    SIZE,
    TOKEN,
    Rule,
    check,
    check_all,
    short,
)

# More layers than tensors are legal where layers share their weights.
_SHARED_LAYERS = 100
_MOST_LABELS = 1_000_000
_MOST_INTEGER = 1 << 63
_COUNTS = re.compile(r"(\w+_)?(num|n)_(\w+_)?layers?|(\w+_)?layers|depths")
_LABELS = re.compile(r"num_labels")
_SIZES = re.compile(
    r"hidden_size|n_embd|d_model|d_ff|d_kv|dim|hidden_dim|vocab_size|"
    r"(num|n)_(\w+_)?heads?|n_positions|n_ctx|max_(\w+_)?position_embeddings"
)
_EPSILONS = re.compile(r"(\w+_)?(eps|epsilon)")
_POSITIVES = re.compile(r"rope_theta|rotary_emb_base|factor")
_SEVERAL = re.compile(r"eos_token_id|(begin_)?suppress_tokens")
_TOKENS = re.compile(rf"\w+_token_id|{_SEVERAL.pattern}")
# transformers does not look at the types of these.
_PLAIN = {
    "chunk_size_feed_forward": COUNT,
    **dict.fromkeys(("output_attentions", "output_hidden_states", "return_dict"), FLAG),
}
_UNBOUNDED = re.compile(r"time_step_\w+|\w*(max|min|limit|clamp|clip)\w*")
"""Numbers that may be infinite, which is "no limit"."""


def check_config(path: Path, settings: Mapping[str, Any], tensors: int) -> None:
    """Raises WeightFormatError for the first setting of config.json that cannot be meant.

    tensors: how many the weights have.
    """
    _check_numbers(path, settings)
    rules = (
        (_COUNTS, Rule("integer", 0, max(tensors, _SHARED_LAYERS), "also")),
        (_LABELS, Rule("integer", 0, _MOST_LABELS)),
        (_SIZES, Rule("number", 1, SIZE.high, "also")),
        (_EPSILONS, EPSILON),
        (_POSITIVES, Rule("number", POSITIVE.low, POSITIVE.high, "also")),
    )
    check_all(path, settings, _PLAIN)
    for name, leaf, value in _settings(settings):
        rule = next((rule for pattern, rule in rules if pattern.fullmatch(leaf)), None)
        # Switches have names like those of counts, and no others.
        is_switch = isinstance(value, bool) and _COUNTS.fullmatch(leaf)
        if rule is not None and _is_number(value) and not is_switch:
            check(path, name, value, rule)
    _check_tokens(path, settings)


def check_generation(path: Path, settings: Mapping[str, Any]) -> None:
    """The same of generation_config.json, whose other values the runtime's settings check."""
    _check_numbers(path, settings)
    _check_tokens(path, settings)


def _check_tokens(path: Path, settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if value is None or not _TOKENS.fullmatch(name):
            continue
        # -1 stands for none in padding; a token that ends a text must be one.
        low = TOKEN.low if _SEVERAL.fullmatch(name) else -1
        check(path, name, value, Rule("integer", low, TOKEN.high, "also"))


def _check_numbers(path: Path, settings: Mapping[str, Any]) -> None:
    for name, leaf, value in _settings(settings):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, int) and abs(item) >= _MOST_INTEGER:
                raise WeightFormatError(f"{path} has {name}={short(item)}, a number of no use")
            if isinstance(item, float) and not math.isfinite(item):
                if math.isinf(item) and _UNBOUNDED.fullmatch(leaf):
                    continue
                raise WeightFormatError(f"{path} has {name}={item}; it must be finite")


def _settings(value: Any, path: str = "", leaf: str = "") -> Iterator[tuple[str, str, Any]]:
    """(place, name, value) of every setting, those of parts too; a list is a value, and what is in
    it has its name."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _settings(inner, f"{path}.{name}" if path else str(name), str(name))
        return
    yield path, leaf, value
    for number, inner in enumerate(value if isinstance(value, list) else ()):
        if isinstance(inner, (list, Mapping)):
            yield from _settings(inner, f"{path}[{number}]", leaf)


def _is_number(value: Any) -> bool:
    """Also of a list of them. Texts and objects are for the configuration class to refuse."""
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, int | float) for item in items)
