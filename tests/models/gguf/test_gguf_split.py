"""A model in several files: all of them, or the one that is missing or wrong by name."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from helpers.gguf_samples import tiny_llama, write_gguf

from graphopt.config import Config
from graphopt.errors import WeightFormatError
from graphopt.models import load
from graphopt.models.gguf.split import open_model

COUNT = 3


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A model in three files, as llama.cpp's gguf-split makes them: metadata in the first."""
    whole = tmp_path / "whole.gguf"
    write_gguf(whole, tiny_llama())
    return split(whole, tmp_path, {})


def split(whole: Path, folder: Path, changes: dict[str, int]) -> list[Path]:
    reader = gguf.GGUFReader(whole)
    paths = []
    for number in range(COUNT):
        path = folder / f"m-{number + 1:05}-of-{COUNT:05}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            for field in reader.fields.values():
                if field.name.startswith("llama."):
                    kind = field.types[0]
                    writer.add_key_value(field.name, field.contents(), kind)
        writer.add_uint16("split.no", changes.get("split.no", number))
        writer.add_uint16("split.count", COUNT)
        total = changes.get("split.tensors.count", len(reader.tensors))
        writer.add_int32("split.tensors.count", total)
        for tensor in reader.tensors[number::COUNT]:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


@pytest.mark.parametrize("named", range(COUNT))
def test_all_parts_are_one_model(parts: list[Path], tmp_path: Path, named: int) -> None:
    config = Config(cache=tmp_path / "cache", offline=True)
    ids = torch.arange(18).view(2, 9)
    with torch.no_grad():
        want = load(tmp_path / "whole.gguf", config=config).module(ids).logits
        got = load(parts[named], config=config).module(ids).logits
    assert torch.equal(got, want)


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    with pytest.raises(WeightFormatError, match=r"in 3 files.*missing.*m-00002-of-00003\.gguf"):
        open_model(parts[0])


def test_a_file_with_another_name(parts: list[Path], tmp_path: Path) -> None:
    parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(WeightFormatError, match=r"split\.count.*NAME-00001-of-00003"):
        open_model(tmp_path / "renamed.gguf")


def test_a_part_of_another_model(parts: list[Path]) -> None:
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(WeightFormatError, match=r"m-00003.*split\.no=1; as part 3 of 3 it must be"):
        open_model(parts[0])


def test_numbers_that_do_not_add_up(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", tiny_llama())
    first = split(tmp_path / "whole.gguf", tmp_path, {"split.tensors.count": 99})[0]
    with pytest.raises(WeightFormatError, match=r"split\.tensors\.count=99, but its 3 parts hold"):
        open_model(first)
