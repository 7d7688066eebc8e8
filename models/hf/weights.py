"""The weights of a Hugging Face folder, by the headers of its safetensors files alone.

Rule: the weights come from model.safetensors, else from the shards that
model.safetensors.index.json lists: files of the folder itself, which must be there, each holding
what the index says and nothing else. The parameters that the configuration makes must fit into the
files (`check_capacity`), so that no number of it asks for memory that no weight needs.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from graphopt.errors import WeightFormatError
from graphopt.files.json_file import read_object
from graphopt.files.regular_file import check_regular
from graphopt.models.build_limit import limited_parts
from graphopt.models.schema import Rule, check, one_line, short
from graphopt.models.weight_dtypes import Entry

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_BYTES = Rule("number", 0, 1 << 62)
# What a class makes beside its parameters: masks, tables of positions.
_MOST_BUFFERS = 1 << 28
# A few parameters that are missing are told by name, later.
_SLACK = 1 << 20
# Layers that share their weights, and parts without any: activations, dropout.
_PARTS, _PARTS_OF_TENSOR = 2_000, 20


def read_entries(folder: Path) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """Every tensor of the files that are read, by name, and what a user should know of the index.

    Empty where the folder has files of other names only. Raises WeightFormatError for a file that
    is missing or damaged, and for an index that does not say what the files hold.
    """
    single, index = folder / SINGLE, folder / INDEX
    if os.path.lexists(single):
        beside = f"{SINGLE} is read; {INDEX} beside it and its shards are not"
        return _header(single), (beside,) if os.path.lexists(index) else ()
    return _sharded(index) if os.path.lexists(index) else ({}, ())


def _sharded(index: Path) -> tuple[dict[str, Entry], tuple[str, ...]]:
    table, stated = _read_index(index)
    entries: dict[str, Entry] = {}
    for place in sorted(set(table.values())):
        path = index.with_name(place)
        if not os.path.lexists(path):
            raise WeightFormatError(
                f"{path} could not be read: it is missing, but {INDEX} lists it; fetch it again"
            )
        for name, entry in _header(path).items():
            if name not in table:
                raise WeightFormatError(f"{path} holds {name}, which {INDEX} does not list")
            if name in entries:
                raise WeightFormatError(f"{path} holds {name}, which {entries[name].path} has, too")
            entries[name] = entry
    for name, place in table.items():
        if name not in entries or entries[name].path.name != place:
            raise WeightFormatError(
                f"{index.with_name(place)} lacks {name}, which {INDEX} says is there"
            )
    found = sum(entry.nbytes for entry in entries.values())
    if stated in (None, found):
        return entries, ()
    return entries, (f"{INDEX}: total_size={stated}, but the shards hold {found} bytes",)


def check_capacity(
    folder: Path, config: PretrainedConfig, model_class: Any, entries: Mapping[str, Entry]
) -> Any:
    """The module that the configuration makes, without memory, after it was found to need no more
    than the files hold. Raises WeightFormatError when it does, and when it cannot be built."""
    make = model_class if issubclass(model_class, PreTrainedModel) else model_class.from_config
    try:
        with torch.device("meta"), limited_parts(_PARTS + _PARTS_OF_TENSOR * len(entries)):
            module = make(copy.deepcopy(config))
    # Every model has checks of its own.
    except Exception as error:
        raise WeightFormatError(
            f"the configuration of {folder} makes no model: {one_line(error)}"
        ) from error
    held = sum(prod(entry.shape) for entry in entries.values())
    wanted = _elements(module.parameters())
    if wanted > 2 * held + _SLACK:
        raise WeightFormatError(
            f"config.json of {folder} makes a model of {wanted} numbers, but its files hold {held}"
        )
    if _elements(module.buffers()) > max(_MOST_BUFFERS, 2 * held):
        raise WeightFormatError(
            f"config.json of {folder} makes a model that computes tables of "
            f"{_elements(module.buffers())} numbers, but its files hold {held}"
        )
    return module


def _elements(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _read_index(path: Path) -> tuple[dict[str, str], float | None]:
    """(tensor -> name of its file, bytes that all are said to have)."""
    index = read_object(path, WeightFormatError)
    table, more = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(table, dict) or not table:
        raise WeightFormatError(f"{path} has no weight_map, or an empty one")
    for name, place in table.items():
        is_name = isinstance(place, str) and Path(place).name == place and "\0" not in place
        if not is_name or not place.endswith(".safetensors"):
            raise WeightFormatError(
                f"{path} has a weight_map that does not name files: {name!r} is in {short(place)}; "
                "it must be the name of a .safetensors file in the same folder"
            )
    if not isinstance(more, dict):
        raise WeightFormatError(f"{path} has metadata={short(more)}; it must be an object")
    size = more.get("total_size")
    if size is not None:
        check(path, "total_size", size, _BYTES)
    return table, size


def _header(path: Path) -> dict[str, Entry]:
    check_regular(path, WeightFormatError)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: _entry(path, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightFormatError(f"the weights {path} could not be read: {error}") from error


def _entry(path: Path, part: Any) -> Entry:
    return Entry(path, tuple(part.get_shape()), str(part.get_dtype()))
