"""The files of a Hugging Face folder beside its configuration: which are read, and what they hold
that the model has no place for.

Rule: the weights come from model.safetensors, else from the shards that
model.safetensors.index.json lists, which must be there and hold what it says. An adapter beside
them would change the model and is refused by name; other modules of a pipeline are told. A tensor
without a place in the model is refused by name, but for the buffers that older classes saved
(`_BUFFERS`), when they hold what the model computes itself, and the heads of BERT's pretraining
(`_OTHER_HEADS`), which are told where the class has none of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from graphopt.errors import UnsupportedError, WeightFormatError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def check_files(folder: Path) -> tuple[str, ...]:
    """Refuse an adapter and a broken set of shards; returns what a user should know of the rest.

    Raises UnsupportedError and WeightFormatError, naming the file.
    """
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        raise UnsupportedError(
            f"{adapter} belongs to an adapter (LoRA and others), which would be left out; merge it "
            "first: peft's PeftModel.merge_and_unload().save_pretrained(folder)"
        )
    notes = []
    if (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            notes.append(f"{SINGLE} is read; {INDEX} beside it and its shards are not")
        else:
            _check_shards(folder)
    if (folder / "modules.json").is_file():
        notes += _other_modules(folder / "modules.json")
    return tuple(notes)


def check_tensors(
    folder: Path, module: nn.Module, unexpected: Iterable[str]
) -> tuple[list[str], list[str]]:
    """(tensors of the files that the model has no place for, what a user should know of others).

    unexpected: names that transformers found no place for; it drops others without a word.
    """
    places = module.state_dict().keys()
    prefix = getattr(module, "base_model_prefix", "")
    heads = {name for name in unexpected if _OTHER_HEADS.search(name)}
    refused, told = set(unexpected) - heads, []
    for name, read in _tensors(folder):
        names = {name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")}
        if names & places:
            continue
        rule = next((rule for pattern, rule in _BUFFERS if pattern.search(name)), None)
        if rule is None:
            continue
        value = read()
        if rule is _is_triangle and value.ndim < 2 and name not in refused:
            # A bias that is one, of a layer that the class calls otherwise.
            continue
        known = next((module.get_buffer(place) for place in names if _has(module, place)), None)
        if rule(value) or (known is not None and _equal(value, known)):
            refused.discard(name)
        else:
            refused.add(name)
        if rule is _is_frequencies and not _is_known(value, module):
            told.append(name)
    notes = []
    if told:
        notes.append(
            f"{', '.join(sorted(told)[:3])}: rotary frequencies in the file that are not those of "
            "the configuration; the configuration's are used, as transformers does"
        )
    if heads:
        notes.append(
            f"{', '.join(sorted(heads))}: heads that {type(module).__name__} does not have"
        )
    return sorted(refused), notes


def _check_shards(folder: Path) -> None:
    table = _weight_map(folder / INDEX)
    for shard in sorted(set(table.values())):
        listed = {name for name, place in table.items() if place == shard}
        present = set(_names(folder / shard))
        for name in sorted(listed - present):
            raise WeightFormatError(f"{folder / shard} lacks {name}, which {INDEX} says is there")
        for name in sorted(present - table.keys()):
            raise WeightFormatError(f"{folder / shard} holds {name}, which {INDEX} does not list")


def _weight_map(path: Path) -> dict[str, str]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if all(isinstance(name, str) and isinstance(table[name], str) for name in table):
            return dict(table)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise WeightFormatError(f"{path} has no weight_map: {error!r}") from error
    raise WeightFormatError(f"{path} has a weight_map that does not name files")


def _names(path: Path) -> list[str]:
    if not path.is_file():
        raise WeightFormatError(
            f"{path} could not be read: it is missing, but {INDEX} lists it; fetch it again"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise WeightFormatError(f"the weights {path} could not be read: {error}") from error


def _tensors(folder: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Name and reader of every tensor of the files that are read."""
    single = folder / SINGLE
    is_single = single.is_file() or not (folder / INDEX).is_file()
    names = [SINGLE] if is_single else sorted(set(_weight_map(folder / INDEX).values()))
    for path in (folder / name for name in names):
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 -- it is no mapping
                    yield name, partial(file.get_tensor, name)


def _other_modules(path: Path) -> list[str]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        kinds = [str(entry["type"]).rpartition(".")[2] for entry in entries]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise WeightFormatError(f"{path} is damaged: {error!r}") from error
    others = [kind for kind in kinds if kind != "Transformer"]
    if not others:
        return []
    return [
        f"{path.name}: {', '.join(others)} come behind the transformer and are not part of the "
        "program, whose outputs are the transformer's"
    ]


def _is_any(_value: Tensor) -> bool:
    return True


def _is_frequencies(value: Tensor) -> bool:
    return value.ndim == 1


def _is_triangle(value: Tensor) -> bool:
    if value.ndim < 2 or value.shape[-1] != value.shape[-2]:
        return False
    return _equal(value.bool().to(value.dtype), value) and bool(
        (value.bool() == torch.ones_like(value, dtype=torch.bool).tril()).all()
    )


def _is_counted(value: Tensor) -> bool:
    return _equal(value.flatten(), torch.arange(value.numel()))


def _is_zero(value: Tensor) -> bool:
    return not value.any()


def _is_low(value: Tensor) -> bool:
    return value.numel() == 1 and float(value) <= -1e4


_BUFFERS: tuple[tuple[re.Pattern[str], Callable[[Tensor], bool]], ...] = (
    (re.compile(r"rotary\w*\.(original_)?inv_freq$"), _is_frequencies),
    (re.compile(r"rotary\w*\.(cos|sin)_cached$"), _is_any),
    (re.compile(r"(attn|attention)\.masked_bias$"), _is_low),
    (re.compile(r"(attn|attention)\.bias$"), _is_triangle),
    (re.compile(r"(^|\.)position_ids$"), _is_counted),
    (re.compile(r"(^|\.)token_type_ids$"), _is_zero),
    (re.compile(r"(^|\.)relative_position_index$"), lambda _value: False),
    (re.compile(r"\.num_batches_tracked$|decoder\.version$"), _is_any),
)
"""Names of buffers that older classes saved, and the values that the classes of today make
themselves. A buffer that the model has, without saving it, may hold what it holds there."""


_OTHER_HEADS = re.compile(r"(^|\.)pooler\.dense\.(weight|bias)$|^cls\.seq_relationship\.")


def _has(module: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    try:
        return leaf in dict(module.get_submodule(owner).named_buffers(recurse=False))
    except AttributeError:
        return False


def _is_known(value: Tensor, module: nn.Module) -> bool:
    """Whether the module has a buffer of these values, up to the rounding of half precision."""
    return any(
        buffer.shape == value.shape and torch.allclose(buffer.float(), value.float(), rtol=1e-2)
        for name, buffer in module.named_buffers()
        if name.endswith("inv_freq")
    )


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool((first == second.to(first.device)).all())
