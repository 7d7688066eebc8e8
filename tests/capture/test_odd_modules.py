"""Modules, examples and weights that no graph can be made of: refused by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.errors import CaptureError


class Net(nn.Module):
    """A linear layer, then `rule`; `weight_of_mine` is a buffer."""

    def __init__(self, rule: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.linear, self.rule = nn.Linear(4, 4), rule
        self.register_buffer("weight_of_mine", torch.ones(4))

    def forward(self, x: Tensor) -> Any:
        return self.rule(self.linear(x) + self.weight_of_mine.float())


X = torch.randn(3, 4)


def with_buffer(data: Tensor) -> nn.Module:
    net = Net().eval()
    net.weight_of_mine = data
    return net


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (torch.ones(4, device="meta"), "on meta"),
        (torch.ones(4).to_sparse(), "layout sparse_coo"),
        (torch.ones(4, dtype=torch.uint16), r"is torch\.uint16; convert it: graphs have float64"),
        (torch.ones(4, dtype=torch.uint32), r"is torch\.uint32; convert it"),
    ],
)
def test_a_weight_that_no_graph_holds_is_named(data: Tensor, what: str) -> None:
    with pytest.raises(CaptureError, match=f"weight 'weight_of_mine' .*{what}"):
        capture(with_buffer(data), X)


def test_a_module_without_data_is_named_wholly_or_partly() -> None:
    with pytest.raises(CaptureError, match=r"weight 'linear\.weight' is on meta"):
        graphopt.compile(Net().eval().to("meta"), X)
    partly = Net().eval()
    partly.linear.bias = nn.Parameter(torch.ones(4, device="meta"))
    with pytest.raises(CaptureError, match=r"weight 'linear\.bias' is on meta"):
        graphopt.compile(partly, X)


def test_an_exported_program_without_data_is_named() -> None:
    net = Net().eval().to("meta")
    program = torch.export.export(net, (torch.ones(3, 4, device="meta"),))
    with pytest.raises(CaptureError, match=r"weight 'linear\.weight' is on meta"):
        graphopt.compile(program)


def test_a_value_of_a_dtype_without_a_name_is_told_with_its_line() -> None:
    net = Net(lambda x: x.to(torch.uint16).float()).eval()
    with pytest.raises(CaptureError, match=r"torch\.uint16 is made at test_odd_modules\.py:\d+"):
        capture(net, X)


def test_double_complex_numbers_are_values() -> None:
    net = Net(lambda x: torch.polar(x.double(), x.double()).real).eval()
    program = graphopt.compile(net, X, backend="reference")
    with torch.no_grad():
        torch.testing.assert_close(program(X), net(X))


DRAWS: dict[str, Callable[[Tensor], Any]] = {
    "aten.rand ": lambda x: x + torch.rand(4),
    "aten.randn_like ": lambda x: x + torch.randn_like(x),
    "aten.randperm ": lambda x: x[:, torch.randperm(4)],
    "aten.bernoulli ": lambda x: torch.bernoulli(x.sigmoid()),
    "aten.multinomial ": lambda x: torch.multinomial(x.sigmoid(), 1),
    "aten.normal": lambda x: x.clone().normal_(),
    "aten.dropout ": lambda x: F.dropout(x),
    "aten.feature_dropout ": lambda x: F.dropout2d(x[None], 0.5, training=True),
    "aten.rrelu ": lambda x: F.rrelu(x, training=True),
    "aten.scaled_dot_product_attention ": lambda x: F.scaled_dot_product_attention(
        x[None], x[None], x[None], dropout_p=0.3
    ),
}


@pytest.mark.parametrize("op", DRAWS)
def test_random_ops_are_refused_by_name_and_line(op: str) -> None:
    net = Net(DRAWS[op]).eval()
    named = rf"draws random numbers: {op}.*at test_odd_modules\.py:\d+"
    with pytest.raises(CaptureError, match=named):
        graphopt.compile(net, X, backend="reference")
    # Already captured it is refused, too.
    with pytest.raises(CaptureError, match=named):
        graphopt.compile(capture(net, X), backend="reference")


@pytest.mark.parametrize(
    "rule",
    [
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: F.dropout(x, 0.0, training=True),
        lambda x: F.rrelu(x, training=False),
        lambda x: (torch.rand(3), x)[1],
    ],
)
def test_random_ops_that_do_nothing_are_harmless(rule: Callable[[Tensor], Any]) -> None:
    net = Net(rule).eval()
    program = graphopt.compile(net, X, backend="reference")
    assert program.report.notes == []
    with torch.no_grad():
        torch.testing.assert_close(program(X), net(X))


def test_a_generator_is_told_what_it_is() -> None:
    generator = torch.Generator()
    with pytest.raises(CaptureError, match=r"such as a torch\.Generator"):
        graphopt.compile(Net(lambda x: x + torch.rand(4, generator=generator)).eval(), X)


def test_a_forward_that_ends_the_process_is_a_refusal() -> None:
    with pytest.raises(CaptureError, match=r"forward of Net ends the process \(SystemExit: 3\)"):
        graphopt.compile(Net(lambda x: sys.exit(3)).eval(), X)


def test_an_interrupt_passes_through() -> None:
    def interrupted(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        graphopt.compile(Net(interrupted).eval(), X)


@pytest.mark.parametrize("example", [3, "x", b"x", object(), {X}, 1.5])
def test_what_is_no_example_is_named(example: Any) -> None:
    kind = type(example).__name__
    with pytest.raises(CaptureError, match=f"example is a {kind}; give what forward takes"):
        graphopt.compile(Net().eval(), example)


@pytest.mark.parametrize(
    ("example", "what"),
    [
        (X.to_sparse(), "the example's 'x' has the layout sparse_coo"),
        (X.to("meta"), "the example's 'x' is on meta"),
        ([X.to_sparse()], "the example's 'x' has the layout sparse_coo"),
        ({3: X}, "forward has no argument 3"),
    ],
)
def test_an_example_that_no_graph_takes_is_named(example: Any, what: str) -> None:
    with pytest.raises(CaptureError, match=what):
        graphopt.compile(Net().eval(), example)


def test_an_input_of_a_dtype_without_a_name_is_told() -> None:
    with pytest.raises(CaptureError, match=r"input 'input' is torch\.uint16; convert it"):
        graphopt.compile(nn.ReLU().eval(), X.to(torch.uint16))


def test_a_traced_module_is_refused() -> None:
    traced = torch.jit.trace(Net().eval(), X)
    with pytest.raises(CaptureError, match="the model is a TorchScript module"):
        graphopt.compile(traced, X)


def test_a_forward_without_a_signature_is_refused() -> None:
    net = Net().eval()
    net.forward = torch.relu
    with pytest.raises(CaptureError, match="forward of Net has no signature to read"):
        graphopt.compile(net, X)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("width", [0, 4])
def test_layers_of_no_width(backend: str, width: int) -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.into = nn.Embedding(9, 8), nn.Linear(8, width)
            self.out = nn.Linear(width, 9)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.out(self.into(self.embed(input_ids)))

    net = Narrow().eval()
    program = graphopt.compile(net, backend=backend)
    ids = torch.randint(0, 9, (2, 5))
    with torch.no_grad():
        torch.testing.assert_close(program(ids), net(ids))
