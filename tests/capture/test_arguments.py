"""How examples become inputs: order, keyword arguments, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.run_graph import assert_close, run
from helpers.tiny_models import tiny_llama
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.errors import CaptureError


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)

    def forward(self, input_ids: Tensor, weights: Tensor | None = None, **options: Any) -> Tensor:
        x = self.embed(input_ids)
        if weights is not None:
            x = x * weights[..., None]
        if "shift" in options:
            x = x + options["shift"]
        return x * options.get("factor", 1.0)


def test_inputs_follow_forward_and_not_the_example() -> None:
    ids, weights = torch.randint(0, 50, (2, 9)), torch.randint(1, 5, (2, 9))
    model = Weighted().eval()
    graph = capture(model, {"weights": weights, "input_ids": ids})
    assert [spec.name for spec in graph.inputs] == ["input_ids", "weights"]
    other, heavy = torch.randint(0, 50, (3, 5)), torch.randint(1, 5, (3, 5))
    with torch.no_grad():
        assert_close(run(graph, other, heavy), model(other, heavy))


def test_tensors_and_numbers_for_open_keyword_arguments() -> None:
    ids, shift = torch.randint(0, 50, (2, 9)), torch.randint(1, 5, (2, 9, 1))
    model = Weighted().eval()
    graph = capture(model, {"shift": shift, "factor": 3.0, "input_ids": ids})
    assert [spec.name for spec in graph.inputs] == ["input_ids", "shift"]
    with torch.no_grad():
        assert_close(run(graph, ids, shift), model(ids, shift=shift, factor=3.0))


def test_hidden_states_of_a_transformers_model() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 101, (2, 9))
    graph = capture(model, {"input_ids": ids, "output_hidden_states": True})
    assert len(graph.output_nodes) == 1 + 3
    with torch.no_grad():
        assert_close(run(graph, ids), model(ids).logits)


def exported() -> torch.export.ExportedProgram:
    return torch.export.export(nn.Linear(3, 3).eval(), (torch.ones(2, 3),))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"dynamic": False}, "dynamic"),
        ({"dynamic": {"x": {0: "b"}}}, "dynamic"),
        ({"strict": True}, "strict"),
    ],
)
def test_arguments_an_exported_program_cannot_follow(options: dict[str, Any], name: str) -> None:
    with pytest.raises(CaptureError, match=f"{name}.*already exported"):
        capture(exported(), **options)


def test_a_graph_is_not_captured_again() -> None:
    graph = capture(exported())
    with pytest.raises(CaptureError, match="captured already"):
        capture(graph)  # type: ignore[arg-type]
