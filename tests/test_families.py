"""Attention of real Hugging Face architectures, by every road: found, equal, no dense mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.hf_families import BY_NAME, FAMILIES, padding
from helpers.hf_roads import (
    ROADS,
    TOLERANCE,
    Road,
    arrive,
    exported,
    measure,
    offers,
    relative_error,
)

from graphopt.capture import capture
from graphopt.errors import CaptureError
from graphopt.ops import attention

QUICK = ("llama", "gemma2", "llama4 text", "deepseek_v3", "bert", "t5")
"""Chosen for variety: plain GQA; softcap and alternating windows; chunks and a router; MLA;
bidirectional; relative bias, encoder-decoder and cross-attention."""

CASES = [
    pytest.param(
        family.name,
        road,
        masked,
        id=f"{family.name.replace(' ', '_')}-{road}-{'mask' if masked else 'no_mask'}",
        marks=[] if family.name in QUICK else [pytest.mark.exhaustive],
    )
    for family in FAMILIES
    for road in ROADS
    for masked in (False, True)
]


@pytest.mark.parametrize(("name", "road", "masked"), CASES)
def test_attention_is_found_and_equal(name: str, road: Road, masked: bool) -> None:
    family = BY_NAME[name]
    if road != "hook" and not offers(family.build(), road):
        pytest.skip(f"transformers does not offer {road} for {name}")
    outcome = measure(family, road, masked)
    assert outcome.error <= TOLERANCE
    # Nothing is passed over silently: what is left has been turned down with a code.
    assert outcome.softmaxes_left + outcome.sdpa_left == len(outcome.rejections)
    assert all(reason.code and reason.text for reason in outcome.rejections)
    assert (outcome.fused, outcome.sdpa_left) == (outcome.present, 0), outcome.rejections
    if road == "hook":
        assert outcome.dense == family.biased


@pytest.mark.parametrize(
    ("name", "masked", "change"),
    [
        ("llama", False, {"causal": False}),
        ("llama", True, {"scale": 0.3}),
        ("mistral", False, {"window": 6}),
        ("gemma2", False, {"softcap": 0.0}),
    ],
)
def test_a_wrong_attention_shows(name: str, masked: bool, change: dict[str, Any]) -> None:
    """The comparison that the other tests rely on sees each attribute."""
    family = BY_NAME[name]
    model = family.build()
    graph = arrive(model, family, "hook", masked)
    assert relative_error(graph, model, family, masked) <= TOLERANCE
    call = next(iter(graph.calls(attention.SPEC.overload)))
    call.kwargs = {**call.kwargs, **change}
    assert relative_error(graph, model, family, masked) > 1e-3


@pytest.mark.parametrize(("name", "operand"), [("bert", "pad_BT"), ("gpt_oss", "sinks_H")])
def test_a_dropped_operand_shows(name: str, operand: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    graph = arrive(model, family, "hook", masked=True)
    call = next(iter(graph.calls(attention.SPEC.overload)))
    position = ("q_BHSD", "k_BGTD", "v_BGTE", "mask", "pad_BT", "sinks_H").index(operand)
    assert call.args[position] is not None
    call.args = (*call.args[:position], None, *call.args[position + 1 :])
    assert relative_error(graph, model, family, masked=True) > 1e-3


def test_padding_rows_differ() -> None:
    ends = padding(3, 12)[:, [0, -1]].tolist()
    assert ends == [[1, 1], [1, 0], [0, 1]]


def test_an_exported_program_brings_its_own_example() -> None:
    """The roads without the hook go through a program that graphopt did not export."""
    family = BY_NAME["llama"]
    program = exported(family.build(), family, masked=False)
    assert not any("graphopt" in str(node.target) for node in program.graph.nodes)
    with pytest.raises(CaptureError, match="carries its own example"):
        capture(program, torch.ones(2, 4, dtype=torch.int64))
