"""Values that no fusion is for: without axes, complex, of integers, with elements in one place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.errors import BackendError

Rule = Callable[[Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(x)


def same(rule: Rule, x: Tensor) -> list[str]:
    """Codes of the rejections, after program and rule were found to agree."""
    program = graphopt.compile(Net(rule).eval(), x, backend="reference", dynamic=False)
    torch.testing.assert_close(program(x), rule(x), rtol=1e-4, atol=1e-5)
    return [r.code for record in program.report.passes for r in record.rejections]


WITHOUT_AXES: list[Rule] = [
    lambda x: torch.softmax(x, 0) * x,
    lambda x: torch.softmax(x, -1) + x.amax(-1),
    lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    lambda x: x.sum(-1).cumsum(0) + x.flip(0),
    lambda x: x.transpose(0, -1) * x.index_select(0, torch.tensor([0])),
    lambda x: x.unsqueeze(0).squeeze(0).masked_fill(x > 0, 1.0),
    lambda x: x.max(0)[0] - x.argmax(-1),
    lambda x: torch.stack([x, x]).softmax(0),
]


@pytest.mark.parametrize("rule", WITHOUT_AXES)
def test_values_without_axes(rule: Rule) -> None:
    same(rule, torch.tensor(0.7))


class ScalarMask(nn.Module):
    """Attention whose mask is made of what has no axes."""

    def forward(self, x: Tensor) -> Tensor:
        shut = torch.tensor(1.0).cumsum(0).flip(0).transpose(0, 0) - 1.0
        scores = x @ x.transpose(-1, -2) + shut.index_select(0, torch.tensor([0]))
        return torch.softmax(scores, -1) @ x


def test_a_mask_without_axes() -> None:
    x = torch.randn(2, 3, 5, 4)
    model = ScalarMask().eval()
    program = graphopt.compile(model, x, backend="reference", dynamic=False)
    torch.testing.assert_close(program(x), model(x))


NO_FLOATS: list[tuple[Rule, torch.dtype]] = [
    (lambda x: F.silu(x) * x, torch.complex64),
    (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5), torch.complex64),
]


@pytest.mark.parametrize(("rule", "dtype"), NO_FLOATS)
def test_complex_numbers_are_left_alone(rule: Rule, dtype: torch.dtype) -> None:
    assert "not-floats" in same(rule, torch.randn(3, 4).to(dtype))


def test_attention_of_complex_numbers_is_left_alone() -> None:
    """torch exports it, and refuses it as it runs."""
    net = Net(lambda x: F.scaled_dot_product_attention(x, x, x)).eval()
    x = torch.randn(2, 2, 3, 4).to(torch.complex64)
    program = graphopt.compile(net, x, backend="reference")
    assert "not-floats" in [r.code for r in program.report.rejections("fuse_attention")]
    with pytest.raises(BackendError, match="not implemented for 'ComplexFloat'"):
        program(x)


def written(y: Tensor) -> Tensor:
    y[..., :1] = 3.0
    return y


WINDOWS: list[Rule] = [
    lambda x: written(x.as_strided((2, 2), (1, 1)).clone()),
    lambda x: written(x.unfold(0, 2, 1).clone()),
    lambda x: written(x.as_strided((2, 2), (1, 1)).transpose(0, 1).contiguous()),
    lambda x: written(x.unfold(0, 3, 1).unbind(0)[0].clone()),
    lambda x: written(x.expand(3, 4).clone()),
]


@pytest.mark.parametrize("rule", WINDOWS)
def test_a_copy_of_windows_is_kept_where_it_is_written_to(rule: Rule) -> None:
    same(rule, torch.randn(4))


def test_a_graph_keeps_any_name_of_a_weight() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"self": nn.Linear(4, 4), "torch": nn.Linear(4, 4)})

        def forward(self, torch: Tensor) -> Tensor:
            return self.parts["torch"](self.parts["self"](torch))

    model, x = Named().eval(), torch.randn(2, 4)
    program = graphopt.compile(model, x)
    assert [spec.name for spec in program.graph.inputs] == ["torch"]
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x))
    assert capture(model, x).copy().op_counts() == program.graph.op_counts()
