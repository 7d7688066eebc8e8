"""A model's generation configuration: applied as transformers applies it, or told by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import graphopt
from graphopt.errors import RequestError, WeightFormatError
from graphopt.models import end_token_ids, generation_defaults, load
from graphopt.program.program import Program
from graphopt.record.report import Report
from graphopt.runtime import Engine, SamplingParams
from graphopt.runtime.request import sampling_from_plain

PROMPT = [7, 9, 7, 9, 8]


def model_with(**settings: Any) -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig(**settings)
    return model


def compiled(model: Any, folder: Path, road: str) -> Program:
    if road == "module":
        return graphopt.compile(model, backend="reference")
    model.save_pretrained(folder / "model")
    program = graphopt.compile(str(folder / "model"), backend="reference")
    if road == "folder":
        return program
    program.save(folder / "program")
    return graphopt.load_program(folder / "program")


GREEDY: list[dict[str, Any]] = [
    {"repetition_penalty": 1.8},
    {"no_repeat_ngram_size": 1},
    {"bad_words_ids": [[8, 7], [3, 4, 5], *([n] for n in range(0, 40, 2))]},
    {"suppress_tokens": list(range(0, 40, 2))},
    {"begin_suppress_tokens": list(range(0, 40, 3))},
    {"eos_token_id": list(range(0, 40, 2)), "min_new_tokens": 5},
    {"max_new_tokens": 3},
]


@pytest.fixture(scope="module")
def plain() -> Program:
    return graphopt.compile(model_with(), backend="reference")


@pytest.fixture(scope="module")
def free(plain: Program) -> tuple[int, ...]:
    """What the model writes when nobody sets anything."""
    return plain.generate(PROMPT, max_tokens=12)[0].tokens


def wanted(model: Any) -> list[int]:
    """What transformers' own generate writes."""
    ids = torch.tensor([PROMPT])
    limit = {} if model.generation_config.max_new_tokens else {"max_new_tokens": 12}
    mask = torch.ones_like(ids)
    written = model.generate(ids, attention_mask=mask, pad_token_id=0, **limit)
    return list(written[0, len(PROMPT) :].tolist())


@pytest.mark.parametrize("settings", GREEDY, ids=lambda settings: next(reversed(settings)))
def test_greedy_settings_are_those_of_transformers(
    plain: Program, free: tuple[int, ...], settings: dict[str, Any]
) -> None:
    model = model_with(**settings)
    defaults = generation_defaults(model)
    ours = sampling_from_plain({"max_tokens": 12, **defaults.settings})
    engine = Engine(plain.executable, None, end_token_ids(model), ours)
    want = wanted(model)
    assert [event.token for event in engine.stream(PROMPT)] == want
    assert want != list(free)
    name = next(name for name in reversed(settings) if name != "eos_token_id")
    (note,) = defaults.notes
    assert note.startswith(f"generation_config: {name}=")
    assert "defaults of generate" in note


def test_defaults_of_modules_folders_and_saved_programs(
    tmp_path: Path, free: tuple[int, ...]
) -> None:
    model = model_with(repetition_penalty=1.8, bad_words_ids=[[9], [8, 7]], max_new_tokens=9)
    want = wanted(model)
    for road in ("module", "folder", "saved"):
        program = compiled(model, tmp_path / road, road)
        (done,) = program.generate(PROMPT)
        assert list(done.tokens) == want, road
        assert [event.token for event in program.stream(PROMPT)] == want
        assert list(program.generate(PROMPT, max_tokens=4)[0].tokens) == want[:4]
        (note,) = program.report.notes
        assert "repetition_penalty=1.8" in note
        # Settings that are given whole are taken as they are.
        whole = SamplingParams(max_tokens=12, ignore_eos=True)
        assert program.generate(PROMPT, whole)[0].tokens == free
        request = (engine := program.engine()).submit(PROMPT)
        events = [event for _ in want for event in engine.step()]
        assert [event.token for event in events] == want
        assert {event.request_id for event in events} == {request}
    with pytest.raises(RequestError, match="no option 'defaults'"):
        program.engine(defaults=SamplingParams())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 0, "top_p": 0.9},
            {"temperature": 0.6, "top_k": 0, "top_p": 0.9},
        ),
        (
            {"do_sample": True, "min_p": 0.1, "top_k": 7},
            {"temperature": 1.0, "top_k": 7, "min_p": 0.1},
        ),
        ({"do_sample": False}, {}),
        ({}, {}),
    ],
)
def test_sampling_is_what_transformers_would_do(
    settings: dict[str, Any], expected: dict[str, Any]
) -> None:
    defaults = generation_defaults(model_with(**settings))
    assert sampling_from_plain(defaults.settings) == SamplingParams(**expected)
    assert all(f"{name}={value}" in defaults.notes[0] for name, value in expected.items())


def test_a_model_that_samples(plain: Program, free: tuple[int, ...]) -> None:
    program = graphopt.compile(model_with(do_sample=True, top_k=20), backend="reference")
    seeded = {program.generate(PROMPT, max_tokens=12, seed=seed)[0].tokens for seed in range(6)}
    assert len(seeded) > 1
    assert program.generate(PROMPT, max_tokens=12, temperature=0)[0].tokens == free
    explicit = SamplingParams(max_tokens=12, temperature=1.0, seed=5)
    assert program.generate(PROMPT, explicit) == plain.generate(PROMPT, explicit)
    assert plain.options.default_sampling == SamplingParams()
    assert plain.report.notes == []


UNAPPLIED: list[dict[str, Any]] = [
    {"num_beams": 3, "length_penalty": 0.5},
    {"penalty_alpha": 0.6},
    {"typical_p": 0.8},
    {"epsilon_cutoff": 0.1},
    {"guidance_scale": 1.5},
    {"forced_eos_token_id": 5},
    {"forced_bos_token_id": 5},
    {"encoder_repetition_penalty": 1.2},
    {"encoder_no_repeat_ngram_size": 2},
    {"exponential_decay_length_penalty": [3, 1.2]},
    {"sequence_bias": [[[3], 2.0]]},
    {"max_length": 30},
    {"min_length": 8},
    {"stop_strings": ["x"]},
    {"max_time": 2.0},
    {"token_healing": True},
    {"watermarking_config": {"bias": 2.5}},
    {"dola_layers": "low"},
    {"force_words_ids": [[1]]},
    {"num_return_sequences": 2, "num_beams": 2},
    {"temperature": 0.5, "top_p": 0.5},
    {"a_key_of_tomorrow": 3},
]


@pytest.mark.parametrize("settings", UNAPPLIED, ids=lambda settings: next(iter(settings)))
def test_what_is_not_applied_is_named_with_its_value(settings: dict[str, Any]) -> None:
    model = model_with()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    defaults = generation_defaults(model)
    assert not defaults.settings
    (note,) = defaults.notes
    assert note.endswith(": not applied by generate")
    for name in settings:
        assert f"{name}=" in note


@pytest.mark.parametrize(
    "settings",
    [
        {"use_cache": False, "cache_implementation": "static"},
        {"eos_token_id": 3, "pad_token_id": 0, "bos_token_id": 1},
        {"num_assistant_tokens": 4},
        {"length_penalty": 0.4, "early_stopping": True},
        {"renormalize_logits": True},
        {"temperature": 1.0, "top_k": 50, "repetition_penalty": 1.0, "num_beams": 1},
    ],
)
def test_settings_without_effect_are_not_worth_a_word(settings: dict[str, Any]) -> None:
    assert generation_defaults(model_with(**settings)).notes == ()


def test_every_setting_of_transformers_is_applied_or_told_or_known_to_be_harmless() -> None:
    """A setting that a later transformers adds is told, until somebody decides about it."""
    import graphopt.models.hf.generation_config as subject

    known = {*subject._APPLIED, *subject._SAMPLING, *subject._WITHOUT_EFFECT}
    for name in vars(GenerationConfig()):
        model = model_with()
        setattr(model.generation_config, name, "a value")
        notes = " ".join(generation_defaults(model).notes)
        assert (name in known) or f"{name}=" in notes or name in subject._OF_BEAMS, name
        assert not (name in subject._WITHOUT_EFFECT and name in notes), name


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[1]", "must be an object"), ("\xff", "not valid JSON")],
)
def test_a_damaged_file_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    model_with().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightFormatError, match=rf"generation_config\.json.*{message}"):
        load(tmp_path / "m")


def test_a_value_of_another_kind_is_an_error() -> None:
    model = model_with()
    model.generation_config.no_repeat_ngram_size = "two"
    with pytest.raises(WeightFormatError, match=r"generation configuration.*no_repeat_ngram_size"):
        graphopt.compile(model, backend="reference")


def test_notes_are_kept_by_a_saved_report() -> None:
    report = Report()
    report.note("of this machine")
    report.note_model("num_beams=3: not applied by generate")
    again = Report.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again.notes == again.model_notes == ["num_beams=3: not applied by generate"]
