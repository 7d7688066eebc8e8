"""Weight files of a folder: the index, the kinds of files, the dtypes, all before they are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.file_kinds import KINDS, put
from helpers.gguf_samples import tiny_llama, write_gguf
from safetensors.torch import load_file, save_file

from graphopt.config import Config
from graphopt.errors import GraphoptError, UnsupportedError, WeightFormatError
from graphopt.models import load

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(cache=tmp_path / "cache", offline=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "s", max_shard_size="40KB")
    return tmp_path / "s"


def index_with(shards: Path, **changes: Any) -> None:
    index = json.loads((shards / INDEX).read_text())
    (shards / INDEX).write_text(json.dumps({**index, **changes}))


@pytest.mark.parametrize("outside", ["../outside.safetensors", "{}/outside.safetensors", "a/b", ""])
def test_shards_lie_in_the_folder(shards: Path, config: Config, outside: str) -> None:
    table = json.loads((shards / INDEX).read_text())["weight_map"]
    name, place = next(iter(table.items()))
    shutil.copy(shards / place, shards.parent / "outside.safetensors")
    same = {key: outside.format(shards.parent) for key, at in table.items() if at == place}
    index_with(shards, weight_map={**table, **same})
    with pytest.raises(WeightFormatError, match=rf"{name}.*in the same folder"):
        load(shards, config=config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": [1]}, "no weight_map"),
        ({"metadata": 3}, "metadata=3"),
        ({"metadata": {"total_size": -1}}, "total_size=-1"),
        ({"metadata": {"total_size": "x"}}, "total_size='x'"),
    ],
)
def test_an_index_that_is_none(
    shards: Path, config: Config, changes: dict[str, Any], words: str
) -> None:
    index_with(shards, **changes)
    with pytest.raises(WeightFormatError, match=words):
        load(shards, config=config)


def test_another_sum_of_bytes_is_told(shards: Path, config: Config) -> None:
    index_with(shards, metadata={"total_size": 7})
    (note,) = load(shards, config=config).notes
    assert "total_size=7, but the shards hold" in note


def test_a_tensor_in_two_shards(shards: Path, config: Config) -> None:
    table = json.loads((shards / INDEX).read_text())["weight_map"]
    other = next(place for place in table.values() if place != table[NORM])
    tensors = load_file(shards / other)
    save_file({**tensors, NORM: torch.zeros(64)}, shards / other, metadata={"format": "pt"})
    with pytest.raises(WeightFormatError, match=rf"holds {NORM}, which .* has, too"):
        load(shards, config=config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "file",
    ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "x.jinja"],
)
def test_something_else_in_a_files_place(
    folder: Path, config: Config, file: str, kind: str
) -> None:
    put(kind, folder / file)
    with pytest.raises(GraphoptError, match=rf"{file} .*{kind}"):
        load(folder, config=config)


def test_links_to_files_are_files(folder: Path, config: Config) -> None:
    """As huggingface_hub's cache has them."""
    for name in ("config.json", "model.safetensors"):
        shutil.move(folder / name, folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)
    assert load(folder, config=config).module is not None


def deep(name: str) -> str:
    return f'{{"{name}": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
)
def test_deep_json(folder: Path, config: Config, file: str) -> None:
    (folder / file).write_text(deep("x"))
    with pytest.raises(WeightFormatError, match=rf"{file} is damaged.*nested"):
        load(folder, config=config)


def recast(folder: Path, dtype: torch.dtype, factor: float = 1.0) -> torch.Tensor:
    tensors = load_file(folder / "model.safetensors")
    tensors[NORM] = (tensors[NORM].double() * factor).to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors[NORM]


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.bool, torch.int8, torch.uint8, torch.int32, torch.int64]
)
def test_dtypes_that_mean_something_else_are_refused(
    folder: Path, config: Config, dtype: torch.dtype
) -> None:
    recast(folder, dtype)
    with pytest.raises(UnsupportedError, match=rf"holds {NORM} as .* without another meaning"):
        load(folder, config=config)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_narrow_floats_are_exact(folder: Path, config: Config, dtype: torch.dtype) -> None:
    stored = recast(folder, dtype)
    source = load(folder, config=config)
    assert torch.equal(source.module.model.norm.weight, stored.float())
    assert source.notes == ()


def test_64_bits_are_rounded_and_told(folder: Path, config: Config) -> None:
    stored = recast(folder, torch.float64)
    source = load(folder, config=config)
    assert torch.equal(source.module.model.norm.weight, stored.float())
    (note,) = source.notes
    assert note.startswith(f"{NORM}: float64 in the file (1 tensors), rounded to torch.float32")


def test_numbers_that_would_be_infinite_are_refused(folder: Path, config: Config) -> None:
    recast(folder, torch.float32, 1e6)
    load(folder, dtype=torch.bfloat16, config=config)
    with pytest.raises(WeightFormatError, match=rf"{NORM} .* infinite as torch\.float16"):
        load(folder, dtype=torch.float16, config=config)
    recast(folder, torch.float64, 1e35)
    with pytest.raises(WeightFormatError, match=rf"{NORM} .* infinite as torch\.float32"):
        load(folder, config=config)


def test_the_same_of_a_gguf_file(tmp_path: Path, config: Config) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = 1e6
    write_gguf(tmp_path / "m.gguf", model)
    load(tmp_path / "m.gguf", config=config)
    with pytest.raises(WeightFormatError, match=r"output_norm.* infinite as torch\.float16"):
        load(tmp_path / "m.gguf", dtype=torch.float16, config=config)
