"""Ways to change a JSON text: a value of another type or size, names, depth, and the bytes."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

_NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, -5, 10**4, 10**6, 10**9, 10**12, 2**31, 2**63, 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1e-5, 1e30, 1e308, -1.0, float("nan"), float("inf"), -float("inf")),
)
_TEXTS = (
    "",
    "x",
    "é☃\U0001f600",
    "\ud800",
    "llama",
    "a" * 3000,
    "../x",
    "/etc/passwd",
    "None",
    "{{",
)
_NAMES = (
    *("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "head_dim"),
    *("num_labels", "rms_norm_eps", "layer_norm_epsilon", "rope_theta", "rope_scaling"),
    *("rope_parameters", "eos_token_id", "pad_token_id", "bos_token_id", "sliding_window"),
    *("layer_types", "architectures", "model_type", "auto_map", "tie_word_embeddings", "dtype"),
    *("torch_dtype", "id2label", "quantization_config", "text_config", "chat_template"),
    *("hidden_act", "max_position_embeddings", "num_key_value_heads", "attn_implementation"),
    *("_attn_implementation", "per_layer_config", "added_tokens_decoder", "model_max_length"),
    *("is_decoder", "use_cache", "chunk_size_feed_forward", "problem_type", "tokenizer_class"),
)


def value(numbers: random.Random, depth: int = 0) -> Any:
    """Any JSON value, NaN and infinities among them."""
    match numbers.randrange(8 if depth < 3 else 5):
        case 0:
            return None
        case 1:
            return numbers.random() < 0.5
        case 2 | 3:
            return numbers.choice(_NUMBERS)
        case 4:
            return numbers.choice(_TEXTS)
        case 5 | 6:
            return [value(numbers, depth + 1) for _ in range(numbers.choice([0, 1, 2, 5]))]
        case _:
            names = [numbers.choice([*_NAMES, *_TEXTS]) for _ in range(numbers.choice([0, 1, 3]))]
            return {name: value(numbers, depth + 1) for name in names}


def changed(numbers: random.Random, text: str) -> bytes:
    """The text with one to three changes, as bytes."""
    kind = numbers.random()
    if kind < 0.12:
        return _damaged(numbers, text.encode())
    if kind < 0.17:
        return _deep(numbers, text)
    if kind < 0.2:
        return _encoded(value(numbers))
    data = json.loads(text)
    for _ in range(numbers.choice([1, 1, 1, 2, 3])):
        _change(numbers, data)
    written = _encoded(data)
    if numbers.random() < 0.05:
        name = json.dumps(numbers.choice([*data, *_NAMES]) if isinstance(data, dict) else "x")
        written = written.replace(b"{", f"{{{name}: {json.dumps(value(numbers))},".encode(), 1)
    return written


def same(numbers: random.Random, text: str) -> bytes:
    """The same values, written otherwise."""
    data = json.loads(text)
    if isinstance(data, dict):
        names = list(data)
        numbers.shuffle(names)
        data = {name: data[name] for name in names}
    indent = numbers.choice([None, 0, 3])
    return (json.dumps(data, indent=indent, ensure_ascii=numbers.random() < 0.5) + "\n").encode()


def _encoded(data: Any) -> bytes:
    return json.dumps(data).encode()


def _change(numbers: random.Random, data: Any) -> None:
    places = list(_places(data))
    if not places or numbers.random() < 0.15:
        if isinstance(data, dict):
            data[numbers.choice(_NAMES)] = value(numbers)
        return
    # Names of the top come first, however many values lie deeper.
    top = places[: len(data)]
    inside, name = numbers.choice(top if numbers.random() < 0.5 else places)
    match numbers.randrange(6):
        case 0:
            del inside[name]
        case 1:
            other, key = numbers.choice(places)
            # Before one holds the other.
            inside[name] = copy.deepcopy(other[key])
        case 2 if isinstance(inside[name], int | float):
            inside[name] = inside[name] * numbers.choice([-1, 2, 10**6]) + 1
        case 3:
            inside[name] = numbers.choice([[inside[name]], {"x": inside[name]}, str(inside[name])])
        case _:
            inside[name] = value(numbers)


def _places(data: Any) -> Any:
    level = [data] if isinstance(data, dict | list) else []
    while level:
        inner = []
        for item in level:
            names = item if isinstance(item, dict) else range(len(item))
            for name in list(names):
                yield item, name
                if isinstance(item[name], dict | list):
                    inner.append(item[name])
        level = inner


def _deep(numbers: random.Random, text: str) -> bytes:
    depth = numbers.choice([90, 150, 900, 1100, 100_000])
    opening, closing = numbers.choice([("[", "]"), ('{"a":', "}")])
    inside = opening * depth + "1" + closing * depth
    if not text.startswith("{") or numbers.random() < 0.3:
        return inside.encode()
    name = json.dumps(numbers.choice(_NAMES))
    return (f"{{{name}: {inside}," + text.lstrip()[1:]).encode()


def _damaged(numbers: random.Random, data: bytes) -> bytes:
    new = bytearray(data)
    place = numbers.randrange(len(new) or 1)
    match numbers.randrange(5):
        case 0:
            del new[place:]
        case 1:
            new[place:place] = numbers.choice(
                [b"\x00", b"\xff", b"\xef\xbb\xbf", b'"', b"NaN", b"["]
            )
        case 2:
            del new[place : place + numbers.choice([1, 5, 100])]
        case 3:
            new[:0] = b"\xef\xbb\xbf"
        case _:
            for _ in range(3):
                new[numbers.randrange(len(new))] ^= 1 << numbers.randrange(8)
    return bytes(new)
