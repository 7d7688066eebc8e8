"""Tokenizer files of somebody else: whatever their parsers raise is the caller's error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fuzz.tokenizers import byte_level

from graphopt.errors import ProgramFormatError, WeightFormatError
from graphopt.models.tokenizer_folder import read_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_level().save_pretrained(tmp_path / "t")
    return tmp_path / "t"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_intact_one_is_read(folder: Path) -> None:
    read = read_tokenizer(folder, WeightFormatError, "")
    assert read.encode("ab c") == byte_level().encode("ab c")


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("tokenizer.json", {"model": None}),
        ("tokenizer.json", {"decoder": {"type": "None"}}),
        ("tokenizer.json", {"added_tokens": [{"id": -1}]}),
        ("tokenizer_config.json", {"model_max_length": {}}),
        ("tokenizer_config.json", {"model_max_length": [3]}),
        ("tokenizer_config.json", {"model_max_length": -1}),
        ("tokenizer_config.json", {"padding_side": 3}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": 3}}),
    ],
)
def test_damage_is_the_callers_error(folder: Path, file: str, changes: dict[str, Any]) -> None:
    edit(folder / file, **changes)
    with pytest.raises(ProgramFormatError, match=r"tokenizer of .*/t could not be read.*; remedy"):
        read_tokenizer(folder, ProgramFormatError, "remedy")


class PanicException(BaseException):
    pass


@pytest.mark.parametrize(
    ("raised", "seen"),
    [(PanicException("x"), WeightFormatError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_panic_is_damage_and_an_interrupt_is_not(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    seen: type[BaseException],
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise raised

    monkeypatch.setattr("graphopt.models.tokenizer_folder.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(seen):
        read_tokenizer(folder, WeightFormatError, "")


def test_without_files(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "none", ignore_errors=True)
    with pytest.raises(WeightFormatError):
        read_tokenizer(tmp_path / "none", WeightFormatError, "")
