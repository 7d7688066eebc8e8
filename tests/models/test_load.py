from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gguf_samples import tiny_llama, write_gguf

from graphopt.config import Config
from graphopt.errors import ModelNotFoundError, UnsupportedError, WeightFormatError
from graphopt.models import BUILTINS, DEFAULT_MODEL, load


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(cache=tmp_path / "cache", offline=True)


@pytest.mark.parametrize("ref", ["nonsense", "missing.gguf", "folder/missing.gguf", "/no/such/x"])
def test_unknown_reference_lists_what_is_accepted(ref: str, config: Config) -> None:
    with pytest.raises(ModelNotFoundError) as error:
        load(ref, config=config)
    for part in (repr(ref), "config.json", ".gguf file", "org/name", *BUILTINS):
        assert part in str(error.value)


def test_other_files_are_not_models(tmp_path: Path, config: Config) -> None:
    path = tmp_path / "model.onnx"
    path.touch()
    with pytest.raises(ModelNotFoundError, match=r"is a file but not a \.gguf one"):
        load(path, config=config)


def test_existing_path_wins_over_hub_name(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    with pytest.raises(ModelNotFoundError, match=r"org/name has no config\.json"):
        load("org/name", config=config)


def test_home_folder_is_expanded(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_gguf(tmp_path / "m.gguf", tiny_llama())
    assert load("~/m.gguf", config=config).name == "m"


def test_settings_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "here"))
    write_gguf(tmp_path / "m.gguf", tiny_llama(), tokenizer=True)
    assert load(tmp_path / "m.gguf").tokenizer is not None
    assert (tmp_path / "here" / "tokenizers").is_dir()


def test_bad_options(tmp_path: Path, config: Config) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_llama())
    with pytest.raises(UnsupportedError, match=r"dtype torch\.int8; one of torch\.float32"):
        load(tmp_path / "m.gguf", dtype=torch.int8, config=config)
    with pytest.raises(UnsupportedError, match="'sparse'; 'dense' or 'packed'"):
        load(tmp_path / "m.gguf", weights="sparse", config=config)  # type: ignore[arg-type]


def test_damaged_gguf(tmp_path: Path, config: Config) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(WeightFormatError, match="damaged"):
        load(tmp_path / "m.gguf", config=config)


def test_default_model_is_built_in() -> None:
    assert DEFAULT_MODEL in BUILTINS


@pytest.mark.parametrize("ref", [None, 5, b"folder", "", ["smollm2-135m"]])
def test_references_of_another_type(ref: Any, config: Config) -> None:
    with pytest.raises(ModelNotFoundError, match=r"is no model. Accepted: a folder"):
        load(ref, config=config)


def test_the_home_of_nobody(config: Config) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist as a path"):
        load("~no-such-user-here/model", config=config)
