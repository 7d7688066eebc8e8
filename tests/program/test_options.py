"""compile's options: none is ignored, and what cannot be done is refused before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny_models import tiny_llama
from transformers import LlamaForCausalLM

import graphopt
from graphopt.errors import ExpectationError, PassError, RowDependenceError, UnsupportedError
from graphopt.program import compile as compiler
from graphopt.program.program import Program

IDS = torch.ones((2, 8), dtype=torch.int64)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def program(model: LlamaForCausalLM) -> Program:
    return graphopt.compile(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"disable": "fuse_norm"}, PassError, r"disable=\['fuse_norm'\]"),
        ({"passes": "fuse_norm"}, PassError, r"passes=\['fuse_norm'\]"),
        ({"enable": "merge_qkv"}, PassError, r"enable=\['merge_qkv'\]"),
        ({"instruments": [1]}, PassError, "instruments holds 1, which is no instrument"),
        ({"instruments": 1}, PassError, "instruments=1 must be a list"),
        ({"disable": None}, PassError, "disable=None must be a list"),
        ({"disable": [3]}, PassError, "disable holds 3"),
        ({"disable": ["fuse_nrom"]}, PassError, "did you mean 'fuse_norm'"),
        ({"limits": {"insert_kv_cache": 0}}, PassError, "must run and cannot be limited"),
        ({"limits": {"fuse_norm": "3"}}, PassError, "'3'}: a limit is an integer >= 0"),
        ({"limits": {"fuse_norm": -1}}, PassError, "a limit is an integer >= 0"),
        ({"limits": {"fuse_norm": True}}, PassError, "a limit is an integer >= 0"),
        ({"limits": ["fuse_norm"]}, PassError, "must be a dict"),
        ({"limits": {"quantize_activations": 1}}, PassError, "not in this run"),
        ({"limits": {"fuse_norm": 1}, "disable": ["fuse_norm"]}, PassError, "not in this run"),
        ({"expect": ["fuse_norm"]}, PassError, "expect=.* must be a dict"),
        ({"expect": {"fuse_norm": "5"}}, PassError, "'5'}: a count is an integer >= 0"),
        ({"expect": {7: 5}}, PassError, "expect holds 7"),
        ({"expect": {"fuse_nrom": 5}}, PassError, "did you mean 'fuse_norm'"),
        ({"expect": {"graphopt.rmsnorm": 0}}, PassError, "no op; did you mean 'graphopt.rms_norm'"),
        ({"expect": {"aten.lineer": 0}}, PassError, "'aten.lineer', which is no op; did you mean"),
        ({"expect": {"fuse_norm": 0}, "disable": ["fuse_norm"]}, PassError, "disabled or not in"),
        ({"expect": {"insert_kv_cache": 1}, "serving": "off"}, PassError, "disabled or not in"),
        ({"passes": ["fuse_norm"], "serving": "required"}, UnsupportedError, "passes= leaves out"),
        ({"passes": ["fuse_norm"], "activations": "int8"}, UnsupportedError, "leaves out"),
        (
            {"activations": "int8", "disable": ["quantize_activations"]},
            UnsupportedError,
            "'quantize_activations', which this run leaves out",
        ),
        ({"threads": 0}, UnsupportedError, "threads=0 .* from 1 to 1024"),
        ({"threads": -1}, UnsupportedError, "threads=-1"),
        ({"threads": 1025}, UnsupportedError, "threads=1025"),
        ({"threads": "2"}, UnsupportedError, "threads='2'"),
        ({"threads": True}, UnsupportedError, "threads=True"),
        ({"threads": 2, "backend": "reference"}, UnsupportedError, "torch.set_num_threads"),
    ],
)  # fmt: skip
def test_refused_before_the_capture(
    model: Any,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def capture(*_: Any, **__: Any) -> None:
        pytest.fail("the capture began")

    monkeypatch.setattr(compiler, "capture", capture)
    with pytest.raises(error, match=message):
        graphopt.compile(model, **options)


def test_a_graph_has_its_inputs(model: Any, program: Program) -> None:
    graph = graphopt.capture(model)
    for options in ({"example": IDS}, {"dynamic": False}):
        with pytest.raises(UnsupportedError, match="inputs of a Graph were fixed"):
            graphopt.compile(graph, **options)
    shapes = {"input_ids": {0: torch.export.Dim("b"), 1: torch.export.Dim("s")}, "use_cache": None}
    call = {"input_ids": IDS, "use_cache": False}
    exported = torch.export.export(model, (), call, dynamic_shapes=shapes, strict=False)
    with pytest.raises(UnsupportedError, match="inputs of a ExportedProgram were fixed"):
        graphopt.compile(exported, dynamic=False)
    with pytest.raises(UnsupportedError, match="is a serving graph, which is compiled already"):
        graphopt.compile(program.serving)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"no data: the program .* took it over"):
        graphopt.compile(program.graph)
    # A captured graph can be compiled as often as one likes.
    first, second = graphopt.compile(graph), graphopt.compile(graph)
    assert torch.equal(torch.as_tensor(first(IDS)), torch.as_tensor(second(IDS)))


def test_int8_without_low_bit_layers_is_said(model: Any) -> None:
    (note,) = graphopt.compile(model, activations="int8").report.notes
    assert "activations='int8' changed nothing" in note
    assert "no low-bit layers" in note


def test_expectations_say_which_graph_was_counted(model: Any) -> None:
    graphopt.compile(model, expect={"graphopt.paged_attention": 2, "graphopt.attention": 2})
    for name, count, place in (
        ("graphopt.paged_attention", 2, "serving"),
        ("graphopt.attention", 2, "forward"),
        ("graphopt.linear_wq", 0, "forward"),
    ):
        message = f"expected 3 of {name}, found {count} in the {place} graph"
        with pytest.raises(ExpectationError, match=message):
            graphopt.compile(model, expect={name: 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"serving": "off"}, r"compiled with serving='off' \[serving-off\]"),
        ({"passes": ["fuse_norm"]}, r"passes= that leave out 'insert_kv_cache' \[pass-left-out\]"),
    ],
)
def test_why_there_is_no_serving_graph(
    model: Any, options: dict[str, Any], message: str, tmp_path: Any
) -> None:
    program = graphopt.compile(model, **options)
    program.save(tmp_path / "p")
    for one in (program, graphopt.load_program(tmp_path / "p")):
        with pytest.raises(RowDependenceError, match=message):
            one.generate([1])


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [([7, 5], 2, (5, 7)), (9, 2, (9,)), (None, 2, (2,)), (None, [4, 3], (3, 4)), (None, None, ())],
)
def test_end_tokens_are_those_of_the_generation_configuration(
    generation: Any, config: Any, expected: tuple[int, ...]
) -> None:
    model = tiny_llama()
    model.config.eos_token_id = config
    assert model.generation_config is not None
    model.generation_config.eos_token_id = generation
    assert graphopt.compile(model).options.eos_token_ids == expected
