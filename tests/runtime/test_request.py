"""SamplingParams and Request."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from graphopt.errors import RequestError
from graphopt.runtime.request import (
    Request,
    SamplingParams,
    Status,
    sampling_from_plain,
    sampling_params,
    token_tuple,
    whole_number,
)

ILLEGAL = [
    ("max_tokens", 0, ">= 1"),
    ("max_tokens", 1.5, "integer"),
    ("max_tokens", True, "integer"),
    ("temperature", -0.1, ">= 0"),
    ("temperature", float("nan"), "finite"),
    ("temperature", float("inf"), "finite"),
    ("temperature", 10**400, "finite"),
    ("temperature", "hot", "finite"),
    ("top_k", -1, ">= 0"),
    ("top_k", 2.0, "integer"),
    ("top_p", 0.0, r"\(0, 1\]"),
    ("top_p", 1.01, r"\(0, 1\]"),
    ("top_p", float("nan"), r"\(0, 1\]"),
    ("min_p", -0.01, r"\[0, 1\]"),
    ("min_p", 1.01, r"\[0, 1\]"),
    ("seed", -1, r"\[0, 2\^63\)"),
    ("seed", 2**63, r"\[0, 2\^63\)"),
    ("seed", 1.0, "integer"),
    ("stop", "text", "tuple"),
    ("stop", ("a", ""), "non-empty"),
    ("stop", ["a"], "tuple"),
    ("stop", (1,), "strings"),
    ("stop_token_ids", (-1,), ">= 0"),
    ("stop_token_ids", [1], "tuple"),
    ("ignore_eos", 1, "True or False"),
    ("repetition_penalty", 0.0, "> 0"),
    ("repetition_penalty", float("nan"), "> 0"),
    ("repetition_penalty", "1.1", "> 0"),
    ("no_repeat_ngram_size", -1, ">= 0"),
    ("no_repeat_ngram_size", 2.0, ">= 0"),
    ("bad_words_ids", ((),), "non-empty tuples"),
    ("bad_words_ids", (1,), "non-empty tuples"),
    ("min_tokens", -1, ">= 0"),
    ("suppress_tokens", (None,), "token ids"),
    ("begin_suppress_tokens", [1], "tuple"),
]


@pytest.mark.parametrize(("name", "value", "legal"), ILLEGAL)
def test_illegal_value_names_field_value_and_range(name: str, value: Any, legal: str) -> None:
    with pytest.raises(RequestError, match=legal) as caught:
        SamplingParams(**{name: value})
    assert f"{name}={value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 1),
        ("temperature", 0),
        ("temperature", 1e-300),
        ("top_k", 0),
        ("top_p", 1),
        ("min_p", 1.0),
        ("seed", 2**63 - 1),
        ("stop", ("a", "b")),
        ("stop_token_ids", (0,)),
        ("repetition_penalty", 1),
        ("bad_words_ids", ((0,), (1, 2))),
        ("suppress_tokens", (0, 0)),
    ],
)
def test_edges_are_legal(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_params_are_frozen_and_hashable() -> None:
    params = SamplingParams(stop=("x",))
    with pytest.raises(AttributeError):
        params.top_k = 3  # type: ignore[misc]
    assert len({params, SamplingParams(stop=("x",))}) == 1


LEGAL = {
    (Status.WAITING, Status.RUNNING),
    (Status.RUNNING, Status.WAITING),
    (Status.RUNNING, Status.FINISHED),
    (Status.WAITING, Status.FINISHED),
}


@pytest.mark.parametrize("source", list(Status))
@pytest.mark.parametrize("target", list(Status))
def test_transitions(source: Status, target: Status) -> None:
    request = Request(7, (1,), SamplingParams(), status=source)
    if (source, target) in LEGAL:
        request.move(target)
        assert request.status is target
    else:
        with pytest.raises(RuntimeError, match="request 7 cannot go from"):
            request.move(target)
        assert request.status is source


def test_tokens_spans_prompt_and_output() -> None:
    request = Request(0, (10, 11, 12), SamplingParams(), output=[13, 14])
    everything = (10, 11, 12, 13, 14)
    for start in range(6):
        for stop in range(start, 6):
            assert request.tokens(start, stop) == everything[start:stop]


def test_append_tells_why_it_was_the_last() -> None:
    request = Request(0, (1,), SamplingParams(max_tokens=3), end_tokens=frozenset({5}))
    assert request.append(4) is None
    assert request.append(4) is None
    assert request.append(4) == "length"
    request = Request(0, (1,), SamplingParams(max_tokens=1), end_tokens=frozenset({5}))
    assert request.append(5) == "stop"


@pytest.mark.parametrize(
    "tokens",
    [
        [1, 2],
        (1, 2),
        np.array([1, 2]),
        np.array([1, 2], np.uint8),
        torch.tensor([1, 2]),
        list(np.array([1, 2])),
        [torch.tensor(1), np.int32(2)],
        range(1, 3),
    ],
)
def test_token_tuple_takes_integers_of_any_library(tokens: Any) -> None:
    ids = token_tuple(tokens)
    assert ids == (1, 2)
    assert {type(token) for token in ids} == {int}


@pytest.mark.parametrize(
    "tokens",
    [
        [1.0],
        ["a"],
        [True],
        [[1, 2]],
        5,
        None,
        torch.tensor([1.5]),
        torch.tensor([True]),
        torch.tensor(3),
        torch.tensor([[1], [2]]),
        [torch.tensor([1])],
        np.array([[1, 2]]),
        np.array([1.0]),
        np.array([True]),
        b"ab",
        {1: 2},
        {1, 2},
    ],
)
def test_token_tuple_refuses_anything_else(tokens: Any) -> None:
    with pytest.raises(RequestError, match="sequence of integer token ids"):
        token_tuple(tokens)


def test_sampling_settings_by_name() -> None:
    params = SamplingParams(max_tokens=3)
    assert sampling_params(None, {"max_tokens": 3}) == params
    assert sampling_params(params, {}) is params
    assert sampling_params(None, {}) is None
    with pytest.raises(RequestError, match="not both"):
        sampling_params(params, {"max_tokens": 3})
    with pytest.raises(
        RequestError,
        match=r"'max_new_tokens'; there are max_tokens, .*; did you mean 'max_tokens'\?",
    ):
        sampling_params(None, {"max_new_tokens": 3})
    with pytest.raises(
        RequestError, match=r"'xyz'; there are max_tokens, .*begin_suppress_tokens$"
    ):
        sampling_params(None, {"xyz": 3})


def test_fields_that_are_not_given_are_the_defaults() -> None:
    defaults = SamplingParams(temperature=0.7, bad_words_ids=((1, 2),))
    got = sampling_params(None, {"max_tokens": 3}, defaults)
    assert got == SamplingParams(max_tokens=3, temperature=0.7, bad_words_ids=((1, 2),))
    assert sampling_params(None, {}, defaults) is None
    params = SamplingParams()
    assert sampling_params(params, {}, defaults) is params


def test_plain_values_and_back() -> None:
    params = SamplingParams(stop=("a",), bad_words_ids=((1, 2), (3,)), seed=4, top_p=0.5)
    assert sampling_from_plain(json.loads(json.dumps(asdict(params)))) == params
    assert sampling_from_plain({}) == SamplingParams()
    with pytest.raises(RequestError, match="no sampling setting is called 'top'"):
        sampling_from_plain({"top": 1})
    with pytest.raises(RequestError, match="temperature"):
        sampling_from_plain({"temperature": [1.0]})


@pytest.mark.parametrize("value", [3, np.int64(3), np.array(3), torch.tensor(3)])
def test_whole_numbers(value: Any) -> None:
    assert whole_number("n", value, 3) == 3
    with pytest.raises(RequestError, match=r"n=.* is not allowed; it must be an integer >= 4"):
        whole_number("n", value, 4)


@pytest.mark.parametrize("value", [3.0, "3", None, True, [3]])
def test_other_numbers_are_refused(value: Any) -> None:
    with pytest.raises(RequestError, match=r"n=.* must be an integer >= 1"):
        whole_number("n", value)
