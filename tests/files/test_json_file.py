"""JSON of somebody else: regular, in UTF-8, of bounded size and depth, with one value a name."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.file_kinds import KINDS, put

from graphopt.errors import ProgramFormatError, WeightFormatError
from graphopt.files.json_file import MOST_DEPTH, parse_json, read_json, read_object


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.json"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_told(path: Path, kind: str) -> None:
    put(kind, path)
    with pytest.raises(WeightFormatError, match=rf"some\.json .*{kind}"):
        read_json(path, WeightFormatError)


def test_a_missing_file_is_the_callers_error(path: Path) -> None:
    with pytest.raises(ProgramFormatError, match=r"some\.json is missing"):
        read_json(path, ProgramFormatError)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"1" * 5000, "not valid JSON"),
        (b'{"a": 1, "b": 2, "a": [3]}', r"'a' is there twice, as 1 and \[3\]"),
        (b"[" * 100_000, "nested more than 100 deep"),
        (b"[" * 900 + b"]" * 900, "nested more than 100 deep"),
        (b'{"a":' * (MOST_DEPTH + 1) + b"1" + b"}" * (MOST_DEPTH + 1), "nested more than"),
    ],
)
def test_damage_is_told(path: Path, text: bytes, words: str) -> None:
    path.write_bytes(text)
    with pytest.raises(WeightFormatError, match=rf"some\.json is.*{words}"):
        read_json(path, WeightFormatError)


def test_a_file_beyond_the_limit_is_not_read(path: Path) -> None:
    path.write_text('"1234567"')
    with pytest.raises(WeightFormatError, match="has 9 bytes; at most 8"):
        read_json(path, WeightFormatError, most_bytes=8)
    assert read_json(path, WeightFormatError, most_bytes=9) == "1234567"


def test_only_an_object_is_an_object(path: Path) -> None:
    path.write_text("[1]")
    with pytest.raises(WeightFormatError, match="holds a list and must be an object"):
        read_object(path, WeightFormatError)


def test_what_is_legal_is_read(path: Path) -> None:
    deep = "[" * (MOST_DEPTH - 1) + "]" * (MOST_DEPTH - 1)
    same = '"same": {"x": 1}, "same": {"x": 1}'
    path.write_text(f'{{"é": [Infinity, null], {same}, "deep": {deep}}}')
    value = read_object(path, WeightFormatError)
    assert value["é"] == [float("inf"), None]
    assert value["same"] == {"x": 1}
    assert parse_json("3", "a header", WeightFormatError) == 3
