"""Model folders: damaged ones are refused, and what loads is what the files say.

A case changes a small valid folder (four architectures, one file and shards, three tokenizers, with
and without settings of generation) in one or two of its files: values in JSON, headers and data of
safetensors, entries of the index, something else in a file's place. What loads is compared with
the tensors of the files, and is run; a change that leaves the values what they were must load.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers.gguf_samples import CHAT_TEMPLATE, randomize
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import graphopt
from graphopt.config import Config
from graphopt.errors import GraphoptError
from graphopt.models import load

from . import json_changes
from .harness import WrongError
from .saving import check_saved
from .tokenizers import TOKENIZERS

_SAVED = 0.05
_SHARD = "20KB"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ROWS = 300
_SMALL = {"vocab_size": ROWS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DECODER: dict[str, Any] = {
    **{**_SMALL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_DECODER)),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**_DECODER, head_dim=8, tie_word_embeddings=True)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**_SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ),
    "albert": lambda: AlbertForMaskedLM(
        AlbertConfig(
            **{**_SMALL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
            **{"embedding_size": 16, "num_attention_heads": 4, "max_position_embeddings": 64},
        )
    ),
}


class Folders:
    """Valid folders to copy from."""

    ci_count = 60

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self._config = Config(cache=folder / "cache", offline=True)
        self._samples: list[Path] = []
        kinds = [(name, sharded) for name in MODELS for sharded in (False, True)]
        for number, (name, sharded) in enumerate(kinds):
            path = folder / f"{name}-{number}"
            model = randomize(MODELS[name]())
            dtype = [torch.float32, torch.bfloat16, torch.float16][number % 3]
            model.to(dtype).save_pretrained(path, max_shard_size=_SHARD if sharded else "1GB")
            tokenizer = TOKENIZERS[number % len(TOKENIZERS)]()
            if tokenizer is not None:
                tokenizer.chat_template = CHAT_TEMPLATE if number % 2 else None
                tokenizer.save_pretrained(path)
            if number % 2:
                settings = {"eos_token_id": [2, 5], "do_sample": True, "temperature": 0.7}
                (path / "generation_config.json").write_text(json.dumps(settings))
            self._samples.append(path)
        source = load(self._samples[0], config=self._config)
        self._program = graphopt.compile(source, backend="reference")
        # The first time imports what it needs, which may take longer than a case.
        check_saved(self._program, source, folder / "program")

    def run(self, numbers: random.Random, folder: Path) -> int:
        """One folder, read in one of the dtypes there are."""
        path = folder / "m"
        shutil.copytree(numbers.choice(self._samples), path)
        harmless = numbers.random() < 0.1
        if harmless:
            _rewrite(numbers, path)
        else:
            for _ in range(numbers.choice([1, 1, 1, 2])):
                numbers.choice(CHANGES)(numbers, path)
        dtype = numbers.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                source = load(path, dtype=dtype, config=self._config)
        except GraphoptError as error:
            if harmless:
                raise WrongError(f"a folder that is as good as before: {error}") from error
            raise
        _compare(source, path, dtype)
        if numbers.random() < _SAVED:
            check_saved(self._program, source, folder / "program")
        return 1


def _rewrite(numbers: random.Random, folder: Path) -> None:
    """The same values in other bytes."""
    files = [path for path in sorted(folder.glob("*.json")) if path.name != "tokenizer.json"]
    path = numbers.choice(files)
    path.write_bytes(json_changes.same(numbers, path.read_text()))
    (folder / "README.md").write_bytes(numbers.randbytes(20))
    if numbers.random() < 0.5:
        target = folder.with_name("elsewhere")
        shutil.move(folder / path.name, target)
        (folder / path.name).symlink_to(target)


def _json(numbers: random.Random, folder: Path) -> None:
    files = sorted(path for path in folder.glob("*.json") if path.is_file())
    path = numbers.choice(files)
    try:
        path.write_bytes(json_changes.changed(numbers, path.read_text()))
    # It was damaged before.
    except (ValueError, RecursionError):
        path.write_bytes(b"")


def _config(numbers: random.Random, folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        return
    try:
        settings = json.loads(path.read_text())
        name = numbers.choice([n for n, v in settings.items() if isinstance(v, int | float)])
    except (ValueError, AttributeError, IndexError, RecursionError):
        return
    settings[name] = json_changes.value(numbers, depth=3)
    path.write_text(json.dumps(settings))


def _header(numbers: random.Random, folder: Path) -> None:
    """Of a safetensors file: values of its JSON, its length, its bytes."""
    path = _weights(numbers, folder)
    if path is None:
        return
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    match numbers.randrange(5):
        case 0:
            data = data[: numbers.randrange(len(data))]
        case 1:
            wrong = numbers.choice([0, 1, length - 1, length + 1, 10**9, 2**63, 2**64 - 1])
            data = wrong.to_bytes(8, "little") + data[8:]
        case 2:
            new = bytearray(data)
            for _ in range(numbers.choice([1, 8])):
                place = numbers.randrange(min(len(new), 8 + length * 2))
                new[place] ^= 1 << numbers.randrange(8)
            data = bytes(new)
        case _:
            try:
                header = json_changes.changed(numbers, header.decode())
            except (ValueError, RecursionError):
                return
            data = len(header).to_bytes(8, "little") + header + rest
    path.write_bytes(data)


def _tensors(numbers: random.Random, folder: Path) -> None:
    """Tensors of a file: dtype, shape, name, place, value."""
    path = _weights(numbers, folder)
    if path is None:
        return
    try:
        tensors = load_file(path)
    # It was damaged before.
    except Exception:
        return
    if not tensors:
        return
    name = numbers.choice(sorted(tensors))
    value = tensors[name]
    match numbers.randrange(6):
        case 0 | 1:
            tensors[name] = value.to(numbers.choice(_DTYPES))
        case 2:
            tensors[numbers.choice([name + ".x", "blk.0", "lm_head.weight", name[:-1]])] = value
        case 3:
            del tensors[name]
        case 4:
            shapes = (value.flatten(), value[None], value[:0], value.repeat(2, *[1] * value.ndim))
            tensors[name] = numbers.choice(shapes)
        case _:
            tensors[name] = value.float() * numbers.choice([1e6, 1e38, math.nan, math.inf])
    save_file({n: t.clone().contiguous() for n, t in tensors.items()}, path, {"format": "pt"})


_DTYPES = (
    *(torch.complex64, torch.bool, torch.int8, torch.int64, torch.uint8, torch.int32),
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)


def _index(numbers: random.Random, folder: Path) -> None:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text() if path.is_file() else "")
        table = dict(index["weight_map"])
        name = numbers.choice(sorted(table))
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return _header(numbers, folder)
    index["weight_map"] = table
    shard = str(table[name])
    outside = folder.with_name("outside.safetensors")
    if (folder / shard).is_file():
        shutil.copy(folder / shard, outside)
    places = (
        *("../outside.safetensors", str(outside), "gone.safetensors", "", ".", "..", "a/b", "\0"),
        *(numbers.choice(sorted(map(str, table.values()))), 3, None, [shard], f"./{shard}"),
    )
    match numbers.randrange(5):
        case 0 | 1:
            table[name] = numbers.choice(places)
        case 2:
            del table[name]
        case 3:
            table[name + "x"] = numbers.choice(places)
        case _:
            index["metadata"] = numbers.choice(
                [{"total_size": json_changes.value(numbers, depth=3)}, json_changes.value(numbers)]
            )
    path.write_text(json.dumps(index))
    return None


def _special(numbers: random.Random, folder: Path) -> None:
    """Something else in the place of a file, or beside them."""
    names = [path.name for path in sorted(folder.iterdir())]
    extra = (
        "adapter_config.json",
        "modules.json",
        INDEX,
        SINGLE,
        "chat_template.jinja",
        "vocab.json",
    )
    path = folder / numbers.choice([*names, *extra])
    if path.is_dir():
        return
    path.unlink(missing_ok=True)
    match numbers.randrange(7):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to("/dev/zero")
        case 3:
            path.symlink_to(path.name)
        case 4:
            path.symlink_to("nowhere")
        case 5:
            path.write_text(json.dumps(json_changes.value(numbers)))


CHANGES: tuple[Callable[[random.Random, Path], None], ...] = (
    *(_json, _json, _json, _config, _config, _header, _tensors, _tensors, _index, _special),
)


def _weights(numbers: random.Random, folder: Path) -> Path | None:
    files = [path for path in sorted(folder.glob("*.safetensors")) if path.is_file()]
    return numbers.choice(files) if files else None


def _compare(source: Any, folder: Path, dtype: torch.dtype) -> None:
    """What was loaded against what lies in the files, read without the product."""
    tensors = _stored(folder)
    for name, parameter in source.module.named_parameters(remove_duplicate=False):
        prefix = source.module.base_model_prefix
        names = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        stored = next((tensors[known] for known in names if known in tensors), None)
        if stored is None:
            tied = [n for n, p in source.module.named_parameters(remove_duplicate=False)
                    if p is parameter and n in tensors]  # fmt: skip
            if not tied:
                raise WrongError(f"{name} is in no file")
            continue
        if not stored.is_floating_point():
            raise WrongError(f"{name} came from {stored.dtype}")
        wanted = stored.to(dtype)
        if bool((wanted.isinf() & stored.float().isfinite()).any()) and dtype == torch.float16:
            raise WrongError(f"{name} became infinite")
        if not _equal(parameter, wanted):
            raise WrongError(f"{name} is not what the file holds")
    _use(source, dtype)


def _stored(folder: Path) -> dict[str, Tensor]:
    if (folder / SINGLE).exists():
        names = [SINGLE]
    else:
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name:
            raise WrongError(f"{name} lies outside the folder")
        with safe_open(folder / name, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(
        first.detach().nan_to_num(7.0), second.nan_to_num(7.0)
    )


def _use(source: Any, dtype: torch.dtype) -> None:
    ids = source.eos_token_ids
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise WrongError(f"end tokens {ids}")
    for name, value in vars(source.module.config).items():
        is_scale = name.endswith(("eps", "epsilon", "theta"))
        if is_scale and not (math.isfinite(value) and value >= 0):
            raise WrongError(f"{name}={value}")
    if source.tokenizer is not None:
        source.tokenizer.encode("ab c")
    with torch.no_grad():
        logits = source.module(torch.tensor([[0, ROWS - 1]])).logits
    if logits.shape[:2] != (1, 2) or logits.dtype != dtype:
        raise WrongError(f"logits {logits.dtype} {tuple(logits.shape)}")


FUZZER = Folders
