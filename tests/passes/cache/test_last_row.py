"""Forwards that return logits of the last row only are served, and return what the model does."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from row_ops import written
from torch import Tensor, nn

import graphopt

VOCABULARY = 31


class Decoder(nn.Module):
    """One causal attention layer; `end` makes the outputs of the rows and the head."""

    def __init__(self, end: Callable[[Tensor, nn.Module], Tensor], width: int = VOCABULARY) -> None:
        super().__init__()
        self.end = end
        self.embed, self.qkv = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 48)
        self.head = nn.Linear(16, width)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) * 2
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.end(x + attended.transpose(1, 2).flatten(2), self.head)


def last_of(model: nn.Module, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).reshape(-1, VOCABULARY)[-1]


ENDS: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "list": lambda x, head: head(x[:, [-1], :]),
    "slice": lambda x, head: head(x[:, -1:, :]),
    "select": lambda x, head: head(x[:, -1]),
    "tensor": lambda x, head: head(x[:, torch.tensor(-1)]),
    "length": lambda x, head: head(x[:, x.shape[1] - 1]),
    "narrow": lambda x, head: head(x.narrow(1, x.shape[1] - 1, 1)),
    "of_logits": lambda x, head: head(x)[:, -1, :].float(),
    "rows_first": lambda x, head: head(x.transpose(0, 1)[-1]),
    "block_after": lambda x, head: head(
        (x[:, -1:] + torch.zeros(x.shape[0], 1, 1)).chunk(2, -1)[0].relu().repeat(1, 1, 2)
    ).squeeze(1),
    "written": lambda x, head: head(torch.cat([written(x[:, -1, :8]), x[:, -1, 8:]], -1)),
}


@pytest.mark.parametrize("end", ENDS)
def test_logits_of_the_last_row(end: str) -> None:
    model = Decoder(ENDS[end]).eval()
    prompts = [[random.randrange(VOCABULARY) for _ in range(n)] for n in (7, 1, 4)]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(5):
            ids.append(int(last_of(model, ids).argmax()))
        expected.append(tuple(ids[len(prompt) :]))
    example = torch.randint(0, VOCABULARY, (2, 9))
    x = torch.randint(0, VOCABULARY, (3, 6))
    for backend in ("reference", "cpu"):
        program = graphopt.compile(model, example, backend=backend, serving="required")
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
        params = graphopt.SamplingParams(max_tokens=5, ignore_eos=True)
        found = program.engine(max_tokens_per_step=3).generate(prompts, params)
        assert [completion.tokens for completion in found] == expected


def test_the_numeric_check_and_the_saved_program_know_the_shape(tmp_path: Path) -> None:
    model = Decoder(ENDS["select"]).eval()
    program = graphopt.compile(model, torch.randint(0, VOCABULARY, (2, 9)), check="numerics")
    assert program.refusal is None
    program.save(tmp_path / "saved")
    x = torch.randint(0, VOCABULARY, (3, 6))
    with torch.no_grad():
        torch.testing.assert_close(
            graphopt.load_program(tmp_path / "saved")(x), model(x), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (lambda x, head: head(x[:, 0]), "rows-mixed"),
        (lambda x, head: head(x[:, -2]), "rows-mixed"),
        (lambda x, head: head(x[:, -1:] + x), "rows-mixed"),
        (lambda x, head: head(x[:, -1] + x.mean(1)), "rows-mixed"),
        (lambda x, head: head(x.flatten(0, 1)[-1:])[:, None], "rows-mixed"),
        (lambda x, head: head(x[-1:])[:, -1], "batch-mixed"),
        (lambda x, head: head(x[:, -1] - x[:, -1].mean(0)), "batch-mixed"),
        (lambda x, head: head(torch.cat([x[:, -1:], x], 1))[:, 1:], "rows-mixed"),
        (lambda x, head: head(x[:, -1] * x.shape[1]), "rows-mixed"),
    ],
)
def test_other_rows_are_refused(end: Callable[[Tensor, nn.Module], Tensor], code: str) -> None:
    program = graphopt.compile(
        Decoder(end).eval(), torch.randint(0, VOCABULARY, (2, 9)), backend="reference"
    )
    assert program.refusal is not None
    assert program.refusal.code == code
    assert program.refusal.source.startswith("test_last_row.py:")


@pytest.mark.parametrize("end", ["select", "slice", "of_logits"])
def test_a_classifier_is_no_language_model(end: str) -> None:
    model = Decoder(ENDS[end], width=3).eval()
    program = graphopt.compile(model, torch.randint(0, VOCABULARY, (2, 9)), backend="reference")
    assert program.refusal is not None
    assert program.refusal.code == "no-logits"
    assert "classifier" in program.refusal.text
    x = torch.randint(0, VOCABULARY, (3, 6))
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
