"""The whole way on the real model: what issue 2 promises, asserted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt
from graphopt.models import load
from graphopt.program.program import Program

pytestmark = pytest.mark.real_model

PROMPTS = (
    "Hi",
    "The capital of France is",
    "Once upon a time, in a land far away,",
    "def fibonacci(n):\n    ",
    "List three uses of copper.",
    "Water boils at 100 degrees Celsius because",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "Q: What is 12 times 12?\nA:",
    "In 1969, astronauts of the Apollo 11 mission landed on the Moon. " * 12,
    "Explain, in simple words and with one example, what a compiler does when it optimises.",
)
TOKENS = 64
EXPECT = {
    "fuse_attention": 30,
    "fuse_norm": 61,
    "fuse_rope": 60,
    "fuse_mlp": 30,
    "graphopt.attention": 30,
    "graphopt.rms_norm": 61,
    "graphopt.rope": 60,
    "graphopt.swiglu": 30,
}


@pytest.fixture(scope="module")
def source() -> Any:
    return load("smollm2-135m", weights="dense")


@pytest.fixture(scope="module")
def program(source: Any) -> Program:
    return graphopt.compile(source, expect=EXPECT, serving="required")


@pytest.fixture(scope="module")
def expected(source: Any) -> list[list[int]]:
    """transformers' own greedy tokens, one prompt at a time, never stopping early."""
    results = []
    for prompt in PROMPTS:
        ids = torch.tensor([source.tokenizer.encode(prompt)])
        with torch.no_grad():
            out = source.module.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=TOKENS,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=0,
            )
        results.append(out[0, ids.shape[1] :].tolist())
    return results


def test_every_step_is_native(program: Program) -> None:
    assert program.options.backend == "cpu"
    assert program.report.notes == []
    assert program.executable.plan.host_steps == []  # type: ignore[attr-defined]


def test_logits_equal_eager(source: Any, program: Program, record_property: Any) -> None:
    worst = 0.0
    for prompt in PROMPTS:
        ids = torch.tensor([source.tokenizer.encode(prompt)])
        with torch.no_grad():
            eager = source.module(ids).logits
        compiled = program(ids)
        assert isinstance(compiled, torch.Tensor)
        worst = max(worst, (compiled - eager).abs().max().item())
    record_property("max_abs_error", worst)
    print(f"max abs error of the logits on 10 prompts: {worst:.2e}")  # noqa: T201
    assert worst <= 1e-4


def test_greedy_tokens_alone(program: Program, expected: list[list[int]]) -> None:
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        (completion,) = program.generate(prompt, max_tokens=TOKENS, ignore_eos=True)
        assert list(completion.tokens) == tokens


def test_greedy_tokens_all_together(program: Program, expected: list[list[int]]) -> None:
    completions = program.generate(PROMPTS, max_tokens=TOKENS, ignore_eos=True)
    for completion, tokens in zip(completions, expected, strict=True):
        assert list(completion.tokens) == tokens


def test_the_dump_is_small_enough_to_read(program: Program, tmp_path: Path) -> None:
    program.dump(tmp_path)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in written) <= 2_000_000
    lengths = {p.name: len(p.read_text().splitlines()) for p in tmp_path.glob("diffs/*.diff")}
    assert len(lengths) >= 8
    assert max(lengths.values()) <= 200, lengths
    assert "@@ model.layers.{0-29} x30 @@" in (tmp_path / "diffs/09_fuse_norm.diff").read_text()


def test_low_bit_program_holds_no_dense_copy() -> None:
    source = load("smollm2-135m", weights="packed")
    low = graphopt.compile(source, activations="int8", expect={**EXPECT, "graphopt.linear_wq": 211})
    held = sum(w.nbytes for w in low.executable.matrices.values())  # type: ignore[attr-defined]
    assert held < 100e6
    (completion,) = low.generate("The capital of France is", max_tokens=8)
    assert "Paris" in (completion.text or "")
