"""The files of a Hugging Face folder beside its configuration: which are read, and what they hold
that the model has no place for.

Rule: what may be read is a regular file. An adapter beside the weights would change the model and
is refused by name; other modules of a pipeline are told. A tensor without a place in the model is
refused by name, but for the buffers that older classes saved (`_BUFFERS`), when they hold what the
model computes itself, and the heads of BERT's pretraining (`_OTHER_HEADS`), which are told where
the class has none of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from graphopt.errors import UnsupportedError, WeightFormatError
from graphopt.files.json_file import read_json
from graphopt.files.regular_file import check_all_regular
from graphopt.models.weight_dtypes import Entry, read_tensor

_READ = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "additional_chat_templates/*")


def check_files(folder: Path) -> tuple[str, ...]:
    """Refuse an adapter and what is no regular file; returns what a user should know of the rest.

    Raises UnsupportedError and WeightFormatError, naming the file.
    """
    for pattern in _READ:
        check_all_regular(sorted(folder.glob(pattern)), WeightFormatError)
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        raise UnsupportedError(
            f"{adapter} belongs to an adapter (LoRA and others), which would be left out; merge it "
            "first: peft's PeftModel.merge_and_unload().save_pretrained(folder)"
        )
    if (folder / "modules.json").exists():
        return tuple(_other_modules(folder / "modules.json"))
    return ()


def places_of(names: Iterable[str], module: nn.Module) -> dict[str, torch.dtype | None]:
    """For each tensor of the files that is not a buffer of older classes the dtype of its place in
    the model, None where no place has its name."""
    places = {name: value.dtype for name, value in module.state_dict().items()}
    found = {
        name: next((places[alias] for alias in _aliases(name, module) if alias in places), None)
        for name in names
    }
    return {
        name: place
        for name, place in found.items()
        if place is not None or not any(pattern.search(name) for pattern, _ in _BUFFERS)
    }


def check_tensors(
    entries: Mapping[str, Entry], module: nn.Module, unexpected: Iterable[str]
) -> tuple[list[str], list[str]]:
    """(tensors of the files that the model has no place for, what a user should know of others).

    unexpected: names that transformers found no place for; it drops others without a word.
    """
    places = module.state_dict().keys()
    heads = {name for name in unexpected if _OTHER_HEADS.search(name)}
    refused, told = set(unexpected) - heads, []
    for name, entry in entries.items():
        names = _aliases(name, module)
        if names & places:
            continue
        rule = next((rule for pattern, rule in _BUFFERS if pattern.search(name)), None)
        if rule is None:
            continue
        value = read_tensor(entry, name)
        if value.dtype.is_complex:
            refused.add(name)
            continue
        value = value.float() if value.dtype.itemsize == 1 and value.is_floating_point() else value
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


def _aliases(name: str, module: nn.Module) -> set[str]:
    """What a tensor may be called in the model: with and without the name of its base model."""
    prefix = getattr(module, "base_model_prefix", "")
    return {name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")}


def _other_modules(path: Path) -> list[str]:
    entries = read_json(path, WeightFormatError)
    is_legal = entries == {} or (
        isinstance(entries, list)
        and all(isinstance(entry, dict) and isinstance(entry.get("type"), str) for entry in entries)
    )
    if not is_legal:
        raise WeightFormatError(f"{path} is damaged: it must list modules, each with its type")
    kinds = [entry["type"].rpartition(".")[2] for entry in entries]
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
