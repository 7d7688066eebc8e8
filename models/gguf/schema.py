"""What the metadata of a GGUF file may be, and that they are those of its tensors.

Two checks, both on the header alone, so that nothing is built of a file that does not fit itself:
every key that is read has a type and a range (`check_types`), and every size is the one that the
tensors have (`check_sizes`). A number can then ask for no more memory and no more layers than the
file holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphopt.errors import WeightFormatError
from graphopt.models.gguf.file import GgufFile
from graphopt.models.schema import (
    EPSILON,
    FLAG,
    POSITIVE,
    SIZE,
    TEXT,
    TEXTS,
    TOKEN,
    TOKENS,
    Rule,
    check_all,
)

_SIZES = Rule("integer", SIZE.low, SIZE.high, "also")
_POSITIVE = Rule("number", POSITIVE.low, POSITIVE.high, "also")
# 0 stands for none.
_FACTOR = Rule("number", 0, POSITIVE.high, "also")
_PART = Rule("integer", 0, 2**16 - 1)
_OF_ARCHITECTURE = {
    "block_count": SIZE,
    "context_length": SIZE,
    "embedding_length": SIZE,
    "vocab_size": SIZE,
    "feed_forward_length": _SIZES,
    "attention.head_count": _SIZES,
    "attention.head_count_kv": _SIZES,
    "attention.key_length": _SIZES,
    "attention.value_length": _SIZES,
    "attention.layer_norm_rms_epsilon": Rule("number", EPSILON.low, EPSILON.high, "also"),
    "rope.dimension_count": _SIZES,
    "rope.freq_base": _POSITIVE,
    "expert_count": Rule("integer", 0, SIZE.high, "also"),
    "rope.scaling.type": TEXT,
    "rope.scaling.factor": _FACTOR,
    "rope.scale_linear": _FACTOR,
}
_OF_TOKENIZER = {
    "model": TEXT,
    "pre": TEXT,
    "tokens": TEXTS,
    "merges": TEXTS,
    "scores": Rule("number", lists="only"),
    "token_type": TOKENS,
    "suppress_tokens": TOKENS,
    "bos_token_id": TOKEN,
    "eos_token_id": TOKEN,
    "eot_token_id": TOKEN,
    "eom_token_id": TOKEN,
    "unknown_token_id": TOKEN,
    "padding_token_id": TOKEN,
    "add_bos_token": FLAG,
    "add_eos_token": FLAG,
    "add_space_prefix": FLAG,
}
_OF_FILE = {
    "general.architecture": TEXT,
    "split.count": _PART,
    "split.no": _PART,
    "split.tensors.count": SIZE,
    "tokenizer.chat_templates": TEXTS,
    **{f"tokenizer.ggml.{name}": rule for name, rule in _OF_TOKENIZER.items()},
}
_BLOCK = re.compile(r"blk\.([0-9]{1,9})\.")


def check_types(path: Path, metadata: Mapping[str, Any]) -> None:
    """Every key that is read is of its type and in its range; raises WeightFormatError."""
    check_all(path, metadata, _OF_FILE)
    prefix = metadata.get("general.architecture", "")
    rules = {f"{prefix}.{name}": rule for name, rule in _OF_ARCHITECTURE.items()}
    templates = {key: TEXT for key in metadata if re.match(r"tokenizer\.chat_template(\.|$)", key)}
    check_all(path, metadata, {**rules, **templates})
    blocks = metadata.get(f"{prefix}.block_count")
    for key in rules:
        value = metadata.get(key)
        if isinstance(value, list) and len(value) != blocks:
            raise WeightFormatError(
                f"{path} has {len(value)} values for {key}, but block_count={blocks}"
            )


def check_sizes(file: GgufFile, sizes: Mapping[str, int]) -> None:
    """The metadata make the model that the tensors are of.

    sizes: hidden, heads, kv_heads, head_dim, feed_forward, blocks. Raises WeightFormatError.
    """
    _check_blocks(file, sizes["blocks"])
    heads, kv_heads, width = sizes["heads"], sizes["kv_heads"], sizes["head_dim"]
    if heads % kv_heads or width % 2:
        raise WeightFormatError(
            f"{file.path} has {heads} heads of {width} columns and {kv_heads} heads of keys; the "
            "first must be a multiple of the last, and the columns even"
        )
    hidden = sizes["hidden"]
    shapes = {
        "token_embd": (None, hidden),
        "blk.0.attn_q": (heads * width, hidden),
        "blk.0.attn_k": (kv_heads * width, hidden),
        "blk.0.ffn_up": (sizes["feed_forward"], hidden),
    }
    for name, (rows, columns) in shapes.items():
        tensor = file.tensors.get(f"{name}.weight")
        if tensor is None:
            raise WeightFormatError(f"{file.path} lacks the tensor {name}.weight")
        if len(tensor.shape) != 2 or tensor.shape != (rows or tensor.shape[0], columns):
            raise WeightFormatError(
                f"tensor {tensor.name} of {file.path} has shape {tensor.shape}; the metadata make "
                f"it {(rows or 'any', columns)}"
            )


def _check_blocks(file: GgufFile, stated: int) -> None:
    found = {int(match[1]) for name in file.tensors if (match := _BLOCK.match(name))}
    if len(found) == stated == max(found) + 1:
        return
    missing = next(number for number in range(len(found) + 1) if number not in found)
    what = f"blk.{missing} is missing" if missing < stated else f"blk.{max(found)} is too many"
    raise WeightFormatError(
        f"{file.path} has block_count={stated}, but its tensors are of {len(found)} blocks: {what}"
    )
