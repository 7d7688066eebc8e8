"""Settings of model folders: types and ranges are checked before transformers sees them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.gguf_samples import tiny_llama
from transformers import CONFIG_MAPPING, AlbertConfig, AlbertModel

import graphopt
from graphopt.config import Config
from graphopt.errors import GraphoptError, WeightFormatError
from graphopt.models import end_token_ids, load
from graphopt.models.hf import folder as hf_folder
from graphopt.models.hf.schema import check_config, check_generation

PATH = Path("config.json")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(cache=tmp_path / "cache", offline=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def edit(folder: Path, file: str = "config.json", **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("num_hidden_layers", [-1, 101, 10**6, 10**9, 2.5, float("nan")]),
        ("n_layer", [10**6]),
        ("num_labels", [-1, 10**9]),
        ("depths", [[2, 10**7]]),
        ("hidden_size", [0, -64, 10**12, 10**400, True]),
        ("vocab_size", [0, -1, 10**11]),
        ("num_attention_heads", [0, -4]),
        ("num_key_value_heads", [0]),
        ("max_position_embeddings", [0, -1, 10**10]),
        ("rms_norm_eps", [-1e-5, 2.0, float("nan"), float("inf"), True]),
        ("layer_norm_epsilon", [float("nan")]),
        ("rope_theta", [0, -5000.0, float("inf"), float("nan")]),
        ("attention_dropout", [float("nan")]),
        ("anything", [10**30, float("nan"), float("inf"), [1.0, float("nan")]]),
        ("eos_token_id", [-5, True, "2", [2, "a"], [None], [[1]], 2**31, 1.0]),
        ("bos_token_id", ["x", 1.5, True]),
        ("suppress_tokens", [[-1], "x"]),
        ("chunk_size_feed_forward", ["x", -1, True]),
        ("return_dict", [3, "x"]),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(WeightFormatError, match=rf"config\.json has {name}"):
            check_config(PATH, {name: value}, 26)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 24, "pad_token_id": -1, "eos_token_id": [2, 7], "rope_theta": 1e6},
        {
            "num_hidden_layers": None,
            "depths": [2, 2, 6],
            "num_labels": 1000,
            "sliding_window": None,
        },
        {"time_step_limit": [0.0, float("inf")], "use_layers": True, "rms_norm_eps": 0},
        {"text_config": {"hidden_size": 64}, "id2label": {"0": "x"}, "rope_theta": 10**9},
        {"eos_token_id": None, "suppress_tokens": []},
    ],
)
def test_what_models_say_is_legal(settings: dict[str, Any]) -> None:
    check_config(PATH, settings, 26)
    check_generation(PATH, settings)


def test_parts_and_lists_are_looked_into() -> None:
    with pytest.raises(WeightFormatError, match=r"text_config\.num_hidden_layers=1000000"):
        check_config(PATH, {"text_config": {"num_hidden_layers": 10**6}}, 26)
    with pytest.raises(WeightFormatError, match=r"parts\[1\]\.rope_theta=0"):
        check_config(PATH, {"parts": [1, {"rope_theta": 0}]}, 26)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000"),
        ({"num_labels": 10**9}, "num_labels=1000000000"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"hidden_size": 2**20}, "its files hold"),
        ({"vocab_size": 10**9}, "its files hold"),
        ({"intermediate_size": 2**31 - 1}, "its files hold|makes no model"),
        ({"eos_token_id": -5}, "eos_token_id=-5"),
    ],
)
def test_numbers_ask_for_no_more_than_the_files_hold(
    folder: Path,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    words: str,
) -> None:
    def build(*_arguments: object, **_options: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(hf_folder, "_read_module", build)
    edit(folder, **changes)
    with pytest.raises(GraphoptError, match=words):
        load(folder, config=config)


@pytest.mark.parametrize("count", [10**6, 10**12])
def test_parts_are_counted_whatever_repeats_them(
    tmp_path: Path, config: Config, count: int
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "embedding_size": 8, "vocab_size": 32}
    AlbertModel(AlbertConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "m")
    edit(tmp_path / "m", inner_group_num=count)
    with pytest.raises(WeightFormatError, match=r"more than \d+ modules and parameters"):
        load(tmp_path / "m", config=config)


@pytest.mark.parametrize("value", [-5, True, "2", [2, "a"], [None], [[1]]])
def test_end_tokens_of_the_generation_configuration(
    folder: Path, config: Config, value: Any
) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(WeightFormatError, match=r"generation_config\.json has eos_token_id="):
        load(folder, config=config)


@pytest.mark.parametrize("value", [-5, True, "2", [2, "a"], [None], [[1]]])
def test_end_tokens_of_a_module(value: Any) -> None:
    model = tiny_llama()
    model.generation_config.eos_token_id = value
    with pytest.raises(WeightFormatError, match=r"generation_config .* has eos_token_id="):
        end_token_ids(model)


def test_settings_of_generation_are_checked_before_the_model_is_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise AssertionError("captured")

    monkeypatch.setattr("graphopt.program.compile.capture", fail)
    model = tiny_llama()
    for name, value in {"eos_token_id": -5, "no_repeat_ngram_size": "two"}.items():
        before = getattr(model.generation_config, name)
        setattr(model.generation_config, name, value)
        with pytest.raises(WeightFormatError, match=name):
            graphopt.compile(model, backend="reference")
        setattr(model.generation_config, name, before)


def test_a_program_with_end_tokens_loads_again(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2, 7]}')
    graphopt.compile(str(folder), backend="reference").save(tmp_path / "p")
    assert graphopt.load_program(tmp_path / "p").options.eos_token_ids == (2, 7)


@pytest.mark.exhaustive
def test_what_transformers_sets_by_itself_is_legal() -> None:
    """For a model of 200 tensors: every architecture that transformers has."""
    refused = {}
    for name, make in CONFIG_MAPPING.items():
        try:
            settings = make().to_dict()
        # Some need arguments, or a package.
        except Exception:
            continue
        try:
            check_config(Path(name), settings, 200)
        except WeightFormatError as error:
            refused[name] = str(error)
    assert not refused
