"""Editing the graph text between two passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny_models import tiny_llama

import graphopt
from graphopt.errors import PassError, ProgramFormatError
from graphopt.ir.graph import Graph

IDS = torch.arange(12).view(2, 6)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def graph(model: Any) -> Graph:
    return graphopt.capture(model)


def test_an_edit_is_compiled_on(model: Any, graph: Graph) -> None:
    seen = []

    def halve(text: str, error: str) -> str:
        seen.append((text, error))
        assert "scale=0.25" in text
        return text.replace("scale=0.25", "scale=0.125")

    program = graphopt.compile(graph, edit={"fuse_attention": halve})
    plain = graphopt.compile(graph)
    assert len(seen) == 1
    assert program.graph.op_counts() == plain.graph.op_counts()
    assert not torch.allclose(program(IDS), plain(IDS), atol=1e-3)
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.125
    try:
        assert torch.allclose(program(IDS), model(IDS).logits, atol=1e-4)
    finally:
        for layer in model.model.layers:
            layer.self_attn.scaling = 0.25
    names = [step.name for step in program.trace.steps]
    assert names[names.index("fuse_attention") + 1] == "edit"
    edited = next(step for step in program.trace.steps if step.name == "edit")
    assert program.report.passes[edited.number - 1].name == "edit"
    assert "-" in program.trace.diff(edited.number)
    assert "scale=0.125" in program.trace.diff(edited.number)


def test_an_edit_of_the_serving_graph(graph: Graph) -> None:
    program = graphopt.compile(
        graph, edit={"insert_kv_cache": lambda text, error: text.replace("scale=0.25", "scale=0.5")}
    )
    assert program.serving is not None
    assert "scale=0.5" in program.trace.steps[-1].text
    assert len(program.generate([1, 2, 3], max_tokens=3)[0].tokens) == 3


def test_text_that_is_left_alone_is_no_edit(graph: Graph) -> None:
    program = graphopt.compile(graph, edit={"fuse_norm": lambda text, error: text})
    assert "edit" not in [step.name for step in program.trace.steps]


def test_an_edit_that_cannot_be_read_is_asked_for_again(graph: Graph) -> None:
    errors = []

    def mended(text: str, error: str) -> str:
        errors.append(error)
        if not error:
            return text.replace("graphopt.rms_norm", "graphopt.rmsnorm", 1)
        return text.replace("graphopt.rmsnorm", "graphopt.rms_norm")

    program = graphopt.compile(graph, edit={"fuse_norm": mended})
    assert len(errors) == 2
    assert "unknown op 'graphopt.rmsnorm'" in errors[1]
    assert "edit" not in [step.name for step in program.trace.steps]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("return %", "return %999", "not defined"),
        ("input %input_ids : i64[batch, sequence]", "input %ids : i64[batch, sequence]", "%input"),
        ("f32[batch, sequence, 64]", "f32[batch, sequence, 65]", "the operands give"),
        ("@model.norm.weight", "@model.nrom.weight", "not in the weights"),
    ],
)
def test_an_edit_that_is_never_mended_is_an_error(
    graph: Graph, old: str, new: str, message: str
) -> None:
    def wrong(text: str, error: str) -> str:
        return text if error else text.replace(old, new)

    with pytest.raises(ProgramFormatError, match=f"the edit after fuse_norm: .*{message}"):
        graphopt.compile(graph, edit={"fuse_norm": wrong})


def test_a_function_of_one_argument_is_asked_once(graph: Graph) -> None:
    asked = []

    def doubled(text: str) -> str:
        asked.append(text)
        return text.replace("scale=0.25", "scale=0.5")

    def broken(text: str) -> str:
        asked.append(text)
        return text.replace("return %", "return %9")

    program = graphopt.compile(graph, edit={"fuse_attention": doubled})
    assert "scale=0.5" in program.trace.steps[-1].text
    with pytest.raises(ProgramFormatError, match=r"the edit after fuse_norm: .*not defined"):
        graphopt.compile(graph, edit={"fuse_norm": broken})
    assert len(asked) == 2


def test_what_an_edit_returns_must_be_text(graph: Graph) -> None:
    with pytest.raises(ProgramFormatError, match="the edit after fuse_norm returned NoneType"):
        graphopt.compile(graph, edit={"fuse_norm": lambda text: None})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"fuse_norm": lambda: None}, r"a function \(text\)"),
        ({"fuse_norm": lambda a, b, c: a}, r"a function \(text\)"),
        ({"fuse_nrom": lambda t, e: t}, "did you mean 'fuse_norm'"),
        ({"merge_qkv": lambda t, e: t}, "not in this run"),
        ({"fuse_norm": "text"}, "a function"),
        (["fuse_norm"], "must be a dict"),
    ],
)
def test_bad_edits_are_refused_first(edit: Any, message: str) -> None:
    with pytest.raises(PassError, match=message):
        graphopt.compile(torch.nn.Linear(1, 1), edit=edit)
