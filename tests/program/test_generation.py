"""Program.generate, stream and engine: what they take, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_llama
from torch import Tensor, nn

import graphopt
from graphopt.errors import CapacityError, ProgramFormatError, RequestError
from graphopt.program.program import Program
from graphopt.runtime import SamplingParams


@pytest.fixture(scope="module")
def program() -> Program:
    return graphopt.compile(tiny_llama())


class Tokenwise(nn.Module):
    """No attention; a weight of a given kind takes part."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(31, 8), nn.Linear(8, 31)
        self.register_buffer("weight", weight)

    def forward(self, input_ids: Tensor) -> Tensor:
        scale = self.weight.real if self.weight.is_complex() else self.weight.float()
        return self.head(self.embed(input_ids) * scale)


IDS = torch.ones((2, 8), dtype=torch.int64)


@pytest.mark.parametrize(
    "prompt",
    [
        torch.tensor([3, 1, 4]),
        torch.tensor([3, 1, 4], dtype=torch.int32),
        np.array([3, 1, 4]),
        list(np.array([3, 1, 4])),
        list(torch.tensor([3, 1, 4])),
        (3, 1, 4),
    ],
)
def test_token_ids_of_any_kind_are_one_prompt(program: Program, prompt: Any) -> None:
    (expected,) = program.generate([[3, 1, 4]], max_tokens=4)
    (done,) = program.generate(prompt, max_tokens=4)
    assert (done.prompt_tokens, done.tokens) == ((3, 1, 4), expected.tokens)
    assert [event.token for event in program.stream(prompt, max_tokens=4)] == list(expected.tokens)
    first, second = program.generate([prompt, [7]], max_tokens=4)
    assert (first.tokens, second.prompt_tokens) == (expected.tokens, (7,))


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        5,
        5.0,
        b"ab",
        {1: 2},
        torch.ones((2, 3), dtype=torch.int64),
        torch.tensor(3),
        torch.rand(3),
        torch.tensor([True]),
        np.ones((1, 2), np.int64),
        [1.5, 2],
        [1, "a"],
        ["a", 1],
        [None],
        [True],
    ],
)
def test_anything_else_is_no_prompt(program: Program, prompt: Any) -> None:
    with pytest.raises(RequestError, match=r"token ids|needs a tokenizer"):
        program.generate(prompt, max_tokens=2)


def test_no_prompts_give_no_completions(program: Program) -> None:
    assert program.generate([]) == []


def test_sampling_settings(program: Program) -> None:
    for attempt in (program.generate, program.stream):
        with pytest.raises(RequestError, match=r"SamplingParams, not dict"):
            attempt([1, 2], {"max_tokens": 3})  # type: ignore[arg-type, operator]
        with pytest.raises(RequestError, match=r"'max_new_tokens'.*did you mean 'max_tokens'"):
            attempt([1, 2], max_new_tokens=3)  # type: ignore[operator]
        with pytest.raises(RequestError, match="not both"):
            attempt([1, 2], SamplingParams(), max_tokens=3)  # type: ignore[operator]
    one_each = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 3)]
    assert [len(c.tokens) for c in program.generate([[1], [2]], one_each)] == [2, 3]
    with pytest.raises(RequestError, match="1 prompts but 0 sampling settings"):
        program.generate([[1]], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"foo": 1}, "no option 'foo'; there are block_size, num_blocks"),
        ({"num_block": 3}, "did you mean 'num_blocks'"),
        ({"executable": None}, "no option 'executable'"),
        ({"block_size": 2.5}, "block_size=2.5"),
        ({"kv_cache_bytes": 1e6}, "kv_cache_bytes=1000000.0"),
    ],
)
def test_engine_options(program: Program, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        program.engine(**options)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_cache_beyond_the_memory_is_refused_at_once(backend: str) -> None:
    program = graphopt.compile(tiny_llama(), backend=backend)
    with pytest.raises(CapacityError, match=r"1000000000000 blocks of 16 .* use fewer blocks"):
        program.engine(num_blocks=10**12)
    with pytest.raises(CapacityError, match="use fewer blocks"):
        program.engine(num_blocks=10**30)


def test_a_model_without_attention_has_no_cache_to_size() -> None:
    program = graphopt.compile(Tokenwise(torch.randn(8)).eval(), IDS)
    with pytest.raises(RequestError, match="no attention"):
        program.engine(kv_cache_bytes=10**6)
    assert len(program.engine(num_blocks=10**12).generate([[1, 2]])[0].tokens) == 128


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.float64])
def test_weights_of_any_storable_kind_survive(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = torch.randn(8, dtype=dtype) if dtype.is_complex else torch.randn(8).to(dtype)
    model = Tokenwise(weight).eval()
    program = graphopt.compile(model, IDS, disable=["fold_constants"])
    program.save(tmp_path / "p")
    loaded = graphopt.load_program(tmp_path / "p")
    assert loaded.weights()["weight"].dtype == dtype
    torch.testing.assert_close(loaded(IDS), model(IDS).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["complex128", "uint16", "sparse"])
def test_other_weights_are_refused_when_saving(
    program: Program, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = (
        torch.eye(3).to_sparse() if kind == "sparse" else torch.ones(3).to(getattr(torch, kind))
    )
    monkeypatch.setattr(Program, "weights", lambda _: {"odd": weight})
    with pytest.raises(ProgramFormatError, match=r"weight 'odd' is .*cannot store; it can: dense"):
        program.save(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(program: Program, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ProgramFormatError, match="could not be written"):
        program.save(tmp_path / "file" / "p")


def test_float64_runs_on_the_reference_backend_with_a_note() -> None:
    model = tiny_llama().double()
    program = graphopt.compile(model)
    (note,) = program.report.notes
    assert "runs on the slow reference backend" in note
    ids = torch.randint(0, 101, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(program(ids), model(ids).logits)
    (done,) = program.generate([1, 2, 3], max_tokens=5, ignore_eos=True)
    context = [1, 2, 3]
    for token in done.tokens:
        with torch.no_grad():
            assert token == int(model(torch.tensor([context])).logits[0, -1].argmax())
        context.append(token)
