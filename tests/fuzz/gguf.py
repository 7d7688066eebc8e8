"""GGUF files: damaged ones are refused, and what loads is what the file says.

A case changes a small valid file (three architectures, seven block types, three tokenizers, tied
and not) in its parts or in its bytes. What loads is compared with the values that the gguf package
reads from the same bytes, packed and dense, and is run; a change that leaves the model what it was
must load.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Q
from helpers.gguf_samples import LEAVES, interleave, randomize, write_gguf
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import graphopt
from graphopt.config import Config
from graphopt.errors import GraphoptError
from graphopt.models import load

from .gguf_changes import DAMAGING, HARMLESS, damage_bytes
from .gguf_parts import ARRAY, BOOL, F32, I32, STRING, U32, Parts, Value, read
from .harness import WrongError
from .saving import check_saved

SIZES: dict[str, Any] = {
    **{"vocab_size": 24, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
}
_CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
_BLOCKS = (Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q8_0)
_PIECES = ("<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "▁ab")
_SAVED = 0.05


class GgufFiles:
    """Small valid files, kept as parts."""

    ci_count = 150

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self._samples: list[Parts] = []
        for number, blocks in enumerate(_BLOCKS):
            architecture = list(_CLASSES)[number % 3]
            config, model = _CLASSES[architecture]
            tied = number % 2 == 1
            made = randomize(
                model(config(**SIZES, num_hidden_layers=1 + number % 2, tie_word_embeddings=tied))
            )
            path = folder / f"{number}.gguf"
            write_gguf(
                path,
                made,
                architecture=architecture,
                quantize=lambda _name, blocks=blocks: blocks,
                tokenizer=number % 3 == 0,
            )
            parts = read(path.read_bytes())
            if number % 3 == 1:
                parts.fields += _sentence_piece()
            self._samples.append(parts)
        source = load(folder / "0.gguf", config=Config(cache=folder / "cache", offline=True))
        self._program = graphopt.compile(source, backend="reference")
        # The first time imports what it needs, which may take longer than a case.
        check_saved(self._program, source, folder / "program")

    def run(self, numbers: random.Random, folder: Path) -> int:
        """One file, read in one of the ways there are."""
        path = folder / "m.gguf"
        parts = numbers.choice(self._samples).copy()
        harmless = numbers.random() < 0.1
        if harmless:
            numbers.choice(HARMLESS)(numbers, parts)
            path.write_bytes(parts.write())
        elif numbers.random() < 0.01:
            _special(numbers, path)
        else:
            path.write_bytes(_damaged(numbers, parts))
        weights = numbers.choice(["dense", "packed"])
        dtype = numbers.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
        config = Config(cache=folder / "cache", offline=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                source = load(path, dtype=dtype, weights=weights, config=config)
        except GraphoptError as error:
            if harmless:
                raise WrongError(f"a file that is as good as before: {error}") from error
            raise
        _compare(source, path, dtype)
        if numbers.random() < _SAVED:
            check_saved(self._program, source, folder / "program")
        return 1


def _damaged(numbers: random.Random, parts: Parts) -> bytes:
    if numbers.random() < 0.25:
        return damage_bytes(numbers, parts.write())
    for _ in range(numbers.choice([1, 1, 1, 2, 4])):
        if parts.fields and parts.tensors:
            numbers.choice(DAMAGING)(numbers, parts)
    return parts.write()


def _special(numbers: random.Random, path: Path) -> None:
    """Something in the file's place that is no file."""
    match numbers.randrange(5):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to("/dev/zero")
        case 3:
            path.symlink_to(path.name)
        case _:
            path.touch()


def _sentence_piece() -> list[tuple[bytes, Value]]:
    texts = [Value(STRING, piece.encode()) for piece in _PIECES]
    types = [Value(I32, kind) for kind in (2, 3, 3, *[1] * (len(_PIECES) - 3))]
    scores = [Value(F32, -float(number)) for number in range(len(_PIECES))]
    values = {
        "model": Value(STRING, b"llama"),
        "tokens": Value(ARRAY, texts, STRING),
        "token_type": Value(ARRAY, types, I32),
        "scores": Value(ARRAY, scores, F32),
        "bos_token_id": Value(U32, 1),
        "eos_token_id": Value(U32, 2),
        "add_bos_token": Value(BOOL, 1),
    }
    return [(f"tokenizer.ggml.{name}".encode(), value) for name, value in values.items()]


def _compare(source: Any, path: Path, dtype: torch.dtype) -> None:
    """What was loaded against what the gguf package reads."""
    module, config = source.module, source.module.config
    try:
        reader = gguf.GGUFReader(path)
    except ValueError as error:
        # It wants 32 bits, whatever the number.
        if "Bad type for general.alignment" in str(error):
            return
        raise
    stored = {tensor.name: tensor for tensor in reader.tensors}
    meta = {
        name: part.contents()
        for name, part in reader.fields.items()
        if name.endswith(("architecture", "rms_epsilon", "eos_token_id"))
    }
    prefix = meta["general.architecture"]
    eps = meta[f"{prefix}.attention.layer_norm_rms_epsilon"]
    eps = eps[0] if isinstance(eps, list) else eps
    if not (np.isfinite(eps) and eps >= 0 and config.rms_norm_eps == eps):
        raise WrongError(f"epsilon {config.rms_norm_eps}, the file says {eps}")
    seen = set()
    for name, parameter in module.named_parameters():
        tensor = stored[gguf_name_of(name)]
        seen.add(tensor.name)
        wanted = _expected(name, tensor, config, prefix)
        if name in source.packed:
            got = source.packed[name].dequantize()
            same = np.array_equal(got.numpy(), wanted, equal_nan=True)
        else:
            rounded = torch.from_numpy(wanted).to(dtype)
            same = torch.equal(parameter.nan_to_num(7.0), rounded.nan_to_num(7.0))
            same = same and torch.equal(parameter.isnan(), rounded.isnan())
        if not same:
            raise WrongError(f"{name} is not what the file holds")
    if seen != set(stored):
        raise WrongError(f"tensors that nothing reads: {set(stored) - seen}")
    _use(source, meta, dtype)


def _expected(name: str, tensor: Any, config: Any, prefix: str) -> np.ndarray[Any, Any]:
    values = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    values = values.reshape(tuple(reversed(tensor.shape.tolist()))).astype(np.float32)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if prefix != "llama" or count is None:
        return values
    back = np.argsort(interleave(np.arange(values.shape[0]), count))
    return values[back]


def gguf_name_of(name: str) -> str:
    """Hugging Face name -> GGUF name, for biases and norms too."""
    stem, _, suffix = name.rpartition(".")
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if stem in top:
        return f"{top[stem]}.{suffix}"
    _, _, layer, leaf = stem.split(".", 3)
    return f"blk.{layer}.{LEAVES[leaf]}.{suffix}"


def _use(source: Any, meta: Mapping[str, Any], dtype: torch.dtype) -> None:
    rows = source.module.config.vocab_size
    ids = source.eos_token_ids
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise WrongError(f"end tokens {ids}")
    if meta.get("tokenizer.ggml.eos_token_id", *ids[:1]) not in (*ids, None):
        raise WrongError(f"end tokens {ids} without the one of the file")
    if source.tokenizer is not None and not all(n < rows for n in source.tokenizer.encode("ab c")):
        raise WrongError("the tokenizer makes tokens that the model does not have")
    if not source.packed:
        with torch.no_grad():
            logits = source.module(torch.tensor([[0, rows - 1]])).logits
        if logits.shape != (1, 2, rows) or logits.dtype != dtype:
            raise WrongError(f"logits {logits.dtype} {tuple(logits.shape)}")


FUZZER = GgufFiles
