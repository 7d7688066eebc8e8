"""Metadata of GGUF files: types, ranges, and the sizes of the tensors, before anything is built."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz.gguf_parts import ARRAY, BOOL, F32, STRING, U32, Parts, Value, read
from helpers.file_kinds import KINDS, put
from helpers.gguf_samples import tiny_llama, write_gguf

from graphopt.config import Config
from graphopt.errors import GraphoptError, WeightFormatError
from graphopt.models import load
from graphopt.models.gguf import model as gguf_model


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, tiny_llama(), tokenizer=True)
    return read(path.read_bytes())


@pytest.fixture
def refused(
    sample: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Parts], Any]], str]:
    """What a changed file is refused with; building its model would be another error."""

    def build(*_arguments: object, **_options: object) -> None:
        raise AssertionError("a model was built")

    def check(change: Callable[[Parts], Any]) -> str:
        parts = sample.copy()
        change(parts)
        path = tmp_path / "changed.gguf"
        path.write_bytes(parts.write())
        monkeypatch.setattr(gguf_model.AutoModelForCausalLM, "from_config", build)
        with pytest.raises(WeightFormatError) as caught:
            load(path, config=Config(cache=tmp_path / "cache", offline=True))
        return str(caught.value)

    return check


def setting(key: str, value: Value) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts.fields = [(known, old) for known, old in parts.fields if known != key.encode()]
        parts.fields.append((key.encode(), value))

    return change


NAN, INFINITE = Value(F32, float("nan")), Value(F32, float("inf"))
NUMBER, TEXT, FLAG = Value(U32, 3), Value(STRING, b"x"), Value(BOOL, 1)
LIST = Value(ARRAY, [NUMBER, NUMBER], U32)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("general.architecture", [NUMBER, Value(ARRAY, [TEXT], STRING)]),
        ("general.alignment", [Value(U32, 0), Value(U32, 33), TEXT, FLAG, LIST]),
        ("llama.block_count", [Value(U32, 0), TEXT, FLAG, LIST, Value(F32, 2.0)]),
        ("llama.embedding_length", [Value(U32, 0), Value(U32, 2**32 - 1), TEXT, LIST]),
        ("llama.context_length", [Value(U32, 0), TEXT]),
        ("llama.attention.head_count", [Value(U32, 0), TEXT, FLAG, Value(ARRAY, [], U32)]),
        ("llama.attention.head_count_kv", [Value(U32, 0), Value(ARRAY, [NUMBER], U32)]),
        ("llama.attention.layer_norm_rms_epsilon", [NAN, INFINITE, Value(F32, -1e-5), TEXT, FLAG]),
        ("llama.rope.freq_base", [NAN, INFINITE, Value(F32, 0.0), Value(F32, -5.0), TEXT]),
        ("llama.rope.scaling.type", [NUMBER, LIST]),
        ("llama.rope.scaling.factor", [NAN, INFINITE, Value(F32, -2.0), TEXT]),
        ("llama.expert_count", [TEXT, Value(F32, 0.0)]),
        ("split.count", [TEXT, LIST, Value(F32, 2.0)]),
        ("tokenizer.ggml.eos_token_id", [Value(5, -5), Value(U32, 2**31), TEXT, FLAG, LIST]),
        ("tokenizer.ggml.eot_token_id", [Value(5, -1), TEXT]),
        ("tokenizer.ggml.tokens", [NUMBER, TEXT, LIST]),
        ("tokenizer.ggml.token_type", [NUMBER, Value(ARRAY, [TEXT], STRING)]),
        ("tokenizer.ggml.suppress_tokens", [NUMBER, Value(ARRAY, [Value(5, -2)], 5)]),
        ("tokenizer.ggml.add_bos_token", [NUMBER, TEXT]),
        ("tokenizer.chat_template", [NUMBER, LIST]),
        ("tokenizer.chat_template.tool_use", [NUMBER]),
    ],
)
def test_keys_have_a_type_and_a_range(
    refused: Callable[[Callable[[Parts], Any]], str], key: str, values: list[Value]
) -> None:
    for value in values:
        text = refused(setting(key, value))
        assert key in text, value


@pytest.mark.parametrize("count", [1, 3, 10_000, 2**31 - 1])
def test_blocks_are_counted_in_the_names(
    refused: Callable[[Callable[[Parts], Any]], str], count: int
) -> None:
    assert f"block_count={count}, but" in refused(setting("llama.block_count", Value(U32, count)))


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("llama.embedding_length", "token_embd"),
        ("llama.feed_forward_length", "blk.0.ffn_up"),
        ("llama.attention.head_count", "blk.0.attn_q"),
        ("llama.attention.head_count_kv", "blk.0.attn_k"),
    ],
)
def test_sizes_are_those_of_the_tensors(
    refused: Callable[[Callable[[Parts], Any]], str], key: str, tensor: str
) -> None:
    for size in (4096, 2**31 - 2):
        change = setting(key, Value(U32, size))
        text = refused(change)
        assert tensor in text or "must be a multiple" in text, text


def named(parts: Parts, name: str) -> Any:
    return next(tensor for tensor in parts.tensors if tensor.name == name.encode())


def overlap(parts: Parts) -> None:
    named(parts, "blk.1.ffn_up.weight").offset = 0


def change(tensor: str, /, **values: Any) -> Callable[[Parts], None]:
    def apply(parts: Parts) -> None:
        for field, value in values.items():
            setattr(named(parts, tensor), field, value)

    return apply


NORM = "output_norm.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (overlap, "overlap"),
        (lambda parts: parts.tensors.append(parts.tensors[3]), "has two tensors"),
        (lambda parts: parts.fields.append(parts.fields[2]), "twice"),
        (change(NORM, dims=[]), "has 0 dimensions"),
        (change(NORM, dims=[2] * 5), "has 5 dimensions"),
        (change(NORM, rank=2**32 - 1), "has 4294967295 dimensions"),
        (change(NORM, dims=[0]), r"has shape \(0,\)"),
        (change("output.weight", dims=[64, 2**60]), "truncated"),
        (change(NORM, dims=[33], type=2), "no number of Q4_0 blocks"),
        (change(NORM, offset=8), "multiple of the alignment"),
        (change(NORM, name=b"\xff"), "is called"),
        (setting("x", Value(ARRAY, b"\x09\0\0\0\1" + bytes(7), ARRAY)), "array of arrays"),
        (setting("x", Value(ARRAY, [], U32, 2**40)), "more than"),
        (setting("x", Value(BOOL, 2)), "neither true nor false"),
    ],
)  # fmt: skip
def test_headers_the_format_does_not_allow(
    refused: Callable[[Callable[[Parts], Any]], str], damage: Callable[[Parts], Any], words: str
) -> None:
    assert re.search(words, refused(damage))


@pytest.mark.parametrize("kind", KINDS)
def test_something_else_in_the_files_place(tmp_path: Path, kind: str) -> None:
    put(kind, tmp_path / "m.gguf")
    with pytest.raises(GraphoptError, match=r"m\.gguf"):
        load(tmp_path / "m.gguf")


def test_an_unused_token_outside_the_vocabulary_is_harmless(sample: Parts, tmp_path: Path) -> None:
    parts = sample.copy()
    setting("tokenizer.ggml.padding_token_id", Value(U32, 64))(parts)
    (tmp_path / "m.gguf").write_bytes(parts.write())
    with pytest.warns(UserWarning, match="no tokenizer"):
        source = load(tmp_path / "m.gguf", config=Config(cache=tmp_path / "cache", offline=True))
    assert source.eos_token_ids == (0, 2)
