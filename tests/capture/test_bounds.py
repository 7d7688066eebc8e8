"""Sizes: every condition that a capture followed is a limit, with its line, or is proven away."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.run_graph import assert_close, run
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.capture import capture
from graphopt.errors import CaptureError, RequestError, RowDependenceError
from graphopt.ir.limits import Limit, read_limit
from graphopt.ir.text.parser import parse_graph
from graphopt.ir.text.printer import canonical_text, print_graph
from graphopt.passes.manager import PassManager
from graphopt.record.report import Report

F = nn.functional


class Positions(nn.Module):
    """A language model with learned positions for at most 64 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(50, 16), nn.Embedding(64, 16)
        self.head = nn.Linear(16, 50)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.positions.weight[: input_ids.shape[1]]
        return self.head(x)


class Head(nn.Module):
    """The lecture's attention head: a triangle of 64 x 64, cut to the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.k, self.q, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(64, 64)))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        length = x.shape[1]
        scores = self.q(x) @ self.k(x).transpose(-2, -1) * 16**-0.5
        scores = scores.masked_fill(self.tril[:length, :length] == 0, float("-inf"))
        return scores.softmax(-1) @ self.v(x)


class Rule(nn.Module):
    """An embedding, then `rule`."""

    def __init__(self, rule: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.rule = nn.Embedding(50, 16), rule

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.rule(self.embed(input_ids), input_ids.shape[1])


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 50, shape)


def told(limits: Sequence[Limit]) -> list[str]:
    assert all(limit.source.startswith("test_bounds.py:") for limit in limits)
    return [f"{limit} {limit.cause}" for limit in limits]


def test_the_bound_of_a_table_is_the_graphs_limit() -> None:
    graph = capture(Positions().eval(), ids(2, 9))
    assert told(graph.limits) == ["sequence <= 64 op"]
    assert graph.copy().limits == graph.limits


def test_the_serving_graph_keeps_the_limit() -> None:
    graph = capture(Positions().eval(), ids(2, 9))
    PassManager(["insert_kv_cache"]).run(graph, Report())
    assert graph.dialect == "serving"
    assert told(graph.limits) == ["sequence <= 64 op"]
    assert parse_graph(print_graph(graph), graph.weights).limits == graph.limits


def test_a_model_without_bounds_has_no_limits() -> None:
    assert capture(nn.Sequential(nn.Embedding(50, 16)).eval(), {"input": ids(2, 9)}).limits == ()


def test_a_head_that_cuts_its_triangle_takes_its_whole_length() -> None:
    torch.manual_seed(0)
    model = Head().eval()
    graph = capture(model, ids(2, 9))
    # At 64 only the stride of the cut is another one.
    assert told(graph.limits) == ["sequence <= 64 op"]
    for length in (1, 2, 17, 63, 64):
        other = ids(3, length)
        with torch.no_grad():
            assert_close(run(graph, other), model(other))


def test_bounds_of_an_exported_program() -> None:
    shapes = {"input_ids": {0: Dim("b"), 1: Dim("s", min=3, max=40)}}
    program = torch.export.export(Positions().eval(), (ids(2, 9),), dynamic_shapes=shapes)
    limits = capture(program).limits
    assert [str(limit) for limit in limits] == ["sequence <= 40", "sequence >= 3"]


def _two_roads(x: Tensor, n: int) -> Tensor:
    return x if n <= 24 else x * 2


def _between(x: Tensor, n: int) -> Tensor:
    return x if 4 < n < 30 else x * 2


def _area(x: Tensor, n: int) -> Tensor:
    return x if x.shape[0] * n < 60 else x * 2


def _excluded(x: Tensor, n: int) -> Tensor:
    return x * 2 if n == 10 else x


def _one_adds(x: Tensor, n: int) -> Tensor:
    return x + torch.full((n, n), 0.5).triu(1)[:, :1] + torch.ones(n, 1) if n > 1 else x


def _one_differs(x: Tensor, n: int) -> Tensor:
    return x * 2 if n == 1 else x


def _one_row(x: Tensor, n: int) -> Tensor:
    return x * 2 if x.shape[0] == 1 else x


def _asserted(x: Tensor, n: int) -> Tensor:
    assert n > 1
    return x


def _multiple(x: Tensor, n: int) -> Tensor:
    return x.view(x.shape[0], -1, 4, 16).sum(2)


def _halves(x: Tensor, n: int) -> Tensor:
    return x[:, : n // 2] + x[:, n // 2 :]


def _convolution(x: Tensor, n: int) -> Tensor:
    return F.conv1d(x.transpose(1, 2), torch.ones(16, 16, 5))


def _pooled(x: Tensor, n: int) -> Tensor:
    return F.avg_pool1d(x.transpose(1, 2), 4)


def _pieces(x: Tensor, n: int) -> Tensor:
    return torch.cat([piece.cumsum(1) for piece in x.split(8, 1)], 1)


def _last_four(x: Tensor, n: int) -> Tensor:
    return x[:, -4:]


def _squeezed(x: Tensor, n: int) -> Tensor:
    return x.squeeze(1)


RULES: list[tuple[Callable[[Tensor, int], Tensor], list[str]]] = [
    (_two_roads, ["sequence <= 24 branch"]),
    (_between, ["sequence >= 5 branch", "sequence <= 29 branch"]),
    (_area, ["batch*sequence <= 59 branch"]),
    (_excluded, ["sequence != 10 branch"]),
    (_one_differs, ["sequence >= 2 branch"]),
    (_one_adds, ["sequence >= 2 branch"]),
    (_one_row, ["batch >= 2 branch"]),
    (_asserted, ["sequence >= 2 op"]),
    (_multiple, ["sequence % 4 == 0 op"]),
    (_halves, ["sequence % 2 == 0 op"]),
    (_convolution, ["sequence >= 5 op"]),
    (_pooled, ["sequence >= 4 op"]),
    (_pieces, ["sequence >= 9 op", "((sequence + 7)//8) == 2 op"]),
    (_last_four, ["sequence >= 4 op"]),
]


@pytest.mark.parametrize(("rule", "expected"), RULES)
def test_a_program_is_the_model_or_refuses(
    rule: Callable[[Tensor, int], Tensor], expected: list[str]
) -> None:
    model = Rule(rule).eval()
    program = graphopt.compile(model, ids(2, 16), backend="reference")
    assert told(program.limits) == expected
    assert program.report.limits == [limit.told() for limit in program.limits]
    refused = taken = 0
    for batch in (1, 3):
        for length in (1, 2, 3, 4, 5, 8, 9, 10, 16, 20, 24, 25, 32):
            given = ids(batch, length)
            try:
                found = program(given)
            except RequestError as error:
                assert re.search(r"has \d+ along axis \d .*test_bounds\.py:\d+", str(error))
                refused += 1
                continue
            with torch.no_grad():
                torch.testing.assert_close(found, model(given))
            taken += 1
    assert refused
    assert taken


def test_a_squeeze_keeps_one_out() -> None:
    program = graphopt.compile(Rule(_squeezed).eval(), ids(2, 16), backend="reference")
    assert [str(limit) for limit in program.limits] == ["sequence >= 2"]


def _scores(x: Tensor, n: int, masked: Callable[[Tensor], Tensor]) -> Tensor:
    scores = x @ x.transpose(1, 2)
    return (masked(scores) if n > 1 else scores).softmax(-1) @ x.contiguous()


@pytest.mark.parametrize(
    "rule",
    [
        lambda x, n: F.scaled_dot_product_attention(x, x, x, is_causal=n > 1),
        lambda x, n: F.scaled_dot_product_attention(x, x, x, is_causal=bool(n > 1)),
        lambda x, n: x.expand(-1, n, -1) if n > 1 else x,
        lambda x, n: x[:, : min(n, 4)],
        lambda x, n: x[:, 1:] + x[:, :-1],
        lambda x, n: x * torch.ones(n, 4)[:, :1] if n > 1 else x * torch.ones(1, 4)[:, :1],
        lambda x, n: _scores(x, n, lambda s: s + torch.full((n, n), float("-inf")).triu(1)),
        lambda x, n: _scores(
            x, n, lambda s: s + torch.full((n, n), float("-inf")).triu(1).type_as(s)
        ),
        lambda x, n: _scores(x, n, lambda s: s.masked_fill(torch.ones(n, n).triu(1) > 0, -1e9)),
        lambda x, n: _scores(x, n, lambda s: torch.where(torch.ones(n, n).tril() > 0, s, -1e9)),
    ],
)
def test_what_is_the_same_for_one_is_no_limit(rule: Callable[[Tensor, int], Tensor]) -> None:
    model = Rule(rule).eval()
    program = graphopt.compile(model, ids(2, 16), backend="reference")
    assert program.limits == ()
    for length in (1, 2, 3, 21):
        given = ids(3, length)
        with torch.no_grad():
            torch.testing.assert_close(program(given), model(given), rtol=1e-5, atol=1e-5)


def test_a_causal_flag_over_other_keys_is_not_the_same_for_one() -> None:
    """With one query and many keys the causal flag hides all keys but the first."""

    class Cross(nn.Module):
        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, memory, memory, is_causal=x.shape[1] > 1)

    axes = {"x": {1: "s"}, "memory": {1: "t"}}
    example = (torch.randn(1, 5, 8), torch.randn(1, 9, 8))
    program = graphopt.compile(Cross().eval(), example, dynamic=axes, backend="reference")
    assert told(program.limits) == ["s >= 2 branch"]


def test_a_limited_road_is_a_warning_and_never_the_models_word() -> None:
    program = graphopt.compile(Rule(_two_roads).eval(), ids(2, 16), backend="reference")
    assert any("sequence <= 24 only" in note for note in program.report.notes)
    with pytest.raises(RequestError, match=r"captured for sequence <= 24") as caught:
        program(ids(1, 25))
    assert "the model takes" not in str(caught.value)
    other = graphopt.compile(Rule(_two_roads).eval(), ids(2, 30), backend="reference")
    assert told(other.limits) == ["sequence >= 25 branch"]


@pytest.mark.parametrize(("stated", "warns"), [(64, False), (100, True)])
def test_a_table_shorter_than_the_stated_context_is_a_warning(stated: int, warns: bool) -> None:
    model = Positions().eval()
    model.config = {"block_size": stated}
    notes = graphopt.compile(model, ids(2, 9), backend="reference").report.notes
    assert any("less than the model's configuration" in note for note in notes) == warns


def test_a_warm_cache_is_a_warning() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.angles = nn.Embedding(50, 16), torch.arange(40)

        def forward(self, input_ids: Tensor) -> Tensor:
            n = input_ids.shape[1]
            if self.angles.shape[0] < n:
                self.angles = torch.arange(n)
            return self.embed(input_ids) + self.angles[:n, None]

    notes = graphopt.compile(Cached().eval(), ids(2, 9), backend="reference").report.notes
    assert any("sequence <= 40 only" in note for note in notes)


def test_requests_are_as_long_as_the_program_takes() -> None:
    class Asserted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)

        def forward(self, input_ids: Tensor) -> Tensor:
            assert input_ids.shape[1] > 2
            return self.head(self.embed(input_ids))

    program = graphopt.compile(Asserted().eval(), ids(2, 9), backend="reference")
    with pytest.raises(RequestError, match=r"the prompt has 2 tokens; .*at least 3 at test_bounds"):
        program.generate([1, 2], max_tokens=2)
    assert len(program.generate([1, 2, 3], max_tokens=2)[0].tokens) == 2


def test_what_a_growing_request_would_run_into_is_not_served() -> None:
    program = graphopt.compile(Rule(_excluded).eval(), ids(2, 9), backend="reference")
    assert program.refusal is not None
    assert program.refusal.code == "limited-sizes"
    with pytest.raises(RowDependenceError, match="sequence != 10"):
        _ = program.executable


def test_limits_are_in_the_text_and_in_saved_programs(tmp_path: Path) -> None:
    program = graphopt.compile(Rule(_pieces).eval(), ids(2, 16), backend="reference")
    text = print_graph(program.graph)
    assert re.search(r"^limit \(\(sequence \+ 7\)//8\) == 2 op  # test_bounds.py:\d+$", text, re.M)
    assert parse_graph(text, program.graph.weights).limits == program.graph.limits
    assert "test_bounds" not in canonical_text(program.graph)
    program.save(tmp_path / "p")
    again = graphopt.load_program(tmp_path / "p")
    assert again.limits == program.limits
    assert again.report.limits == program.report.limits
    with pytest.raises(RequestError, match="the model takes"):
        again(ids(1, 30))


@pytest.mark.parametrize(
    "line",
    [
        "limit tokens <= 3 op",
        "limit sequence <= 3",
        "limit __import__('os') <= 3 op",
        "limit a % 0 op",
    ],
)
def test_a_wrong_line_is_refused(line: str) -> None:
    graph = capture(Positions().eval(), ids(2, 9))
    text = print_graph(graph)
    wrong = re.sub(r"^limit .*$", line, text, flags=re.M)
    with pytest.raises(graphopt.errors.ProgramFormatError, match="line 3"):
        parse_graph(wrong, graph.weights)


@pytest.mark.parametrize(
    ("limit", "sizes", "holds"),
    [
        (Limit("a*b", "<=", 6), {"a": 2, "b": 3}, True),
        (Limit("a*b", "<=", 5), {"a": 2, "b": 3}, False),
        (Limit("Mod(a, 4) + Max(b, 2)", "==", 3), {"a": 5, "b": 1}, True),
        (Limit("a", "%", 8), {"a": 24}, True),
        (Limit("a", "%", 8), {"a": 12}, False),
        (Limit("7//(a - 1)", ">=", 0), {"a": 1}, False),
    ],
)
def test_a_limit_is_read_and_checked(limit: Limit, sizes: dict[str, int], holds: bool) -> None:
    assert limit.holds(sizes) == holds
    assert limit.names == sizes.keys()
    assert read_limit(limit.line()) == limit


@pytest.mark.parametrize(
    ("forward", "dynamic", "message"),
    [
        (
            lambda x: x + torch.arange(16),
            True,
            r"axis 1 \('sequence'\) of 'x' is fixed at 16 by Fixed at test_bounds.py:\d+; leave",
        ),
        (lambda x: x * int(x.shape[1]), True, r"fixed at 16 by Fixed at test_bounds.py:\d+"),
        (lambda x: x, {"x": {0: "n", 1: "n"}}, r"size 'n' is 2 in axis 0 .* and 16 in axis 1"),
    ],
)
def test_an_axis_that_cannot_stay_open_is_refused(forward: Any, dynamic: Any, message: str) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return forward(x)

    with pytest.raises(CaptureError, match=message):
        capture(Fixed().eval(), {"x": ids(2, 16)}, dynamic=dynamic)
