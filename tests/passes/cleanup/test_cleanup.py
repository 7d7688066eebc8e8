"""The cleanup passes: each does its thing, refuses the look-alike, and changes no value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.run_graph import CLEANUP, apply, assert_idempotent, run
from helpers.tiny_models import tiny_llama
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.ir.graph import Graph
from graphopt.ir.verify import verify

Function = Callable[[Tensor], Tensor]


class Wrapped(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) + self.weight


def graph_of(function: Function, x: Tensor) -> Graph:
    return capture(Wrapped(function).eval(), x, dynamic={"x": {0: "batch"}})


def check(function: Function, passes: tuple[str, ...], x: Tensor | None = None) -> Graph:
    """Apply; the result is bitwise what it was."""
    x = torch.randn(4, 5, 6) if x is None else x
    graph = graph_of(function, x)
    before = run(graph, x)
    apply(graph, *passes)
    assert torch.equal(run(graph, x), before)
    assert_idempotent(graph, passes)
    return graph


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.to(torch.float32),
        lambda x: x * 1.0,
        lambda x: x / 1.0,
        lambda x: x.contiguous(),
        lambda x: x.clone(),
        lambda x: torch.nn.functional.dropout(x, 0.5, training=False),
        lambda x: x[:, :, 0:6],
        lambda x: x.expand(x.shape),
        lambda x: x.reshape(x.shape),
    ],
)
def test_noops_are_removed(function: Function) -> None:
    graph = check(function, ("remove_noops", "dead_code"))
    assert graph.op_counts() == {"aten.add.Tensor": 1}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + 0.0,  # -0.0 + 0.0 is 0.0
        lambda x: x * 1.5,
        lambda x: x[:, :, 0:3].repeat(1, 1, 2),
        lambda x: x.to(torch.float64).to(torch.float32) * 2.0,
    ],
)
def test_look_alikes_stay(function: Function) -> None:
    graph = check(function, ("remove_noops",))
    assert graph.num_calls() > 1


def test_adding_a_float_zero_keeps_the_sign_of_zero() -> None:
    x = torch.full((2, 5, 6), -0.0)
    graph = graph_of(lambda x: x + 0.0, x)
    apply(graph, "remove_noops")
    assert graph.op_counts()["aten.add.Tensor"] == 2


def test_integer_zero_is_dropped() -> None:
    x = torch.randint(0, 9, (3, 5, 6))
    graph = check(lambda x: x + 0, ("remove_noops",), x)
    assert graph.op_counts()["aten.add.Tensor"] == 1


def test_a_copy_stays_while_a_view_reads_its_layout() -> None:
    def turned(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().view(x.shape[0], 30)[:, :6]

    x = torch.randn(3, 5, 6)
    graph = graph_of(turned, x)
    before = run(graph, x)
    report = apply(graph, "remove_noops")
    (left,) = report.rejections("remove_noops")
    assert (left.code, graph.op_counts()["aten.contiguous"]) == ("layout-needed", 1)
    assert torch.equal(run(graph, x), before)
    graph = check(turned, ("canonicalize_views", "remove_noops"))
    assert graph.op_counts()["aten.contiguous"] == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(-1, 30).view(-1, 5, 6),
        lambda x: x.flatten(1).unflatten(1, (5, 6)),
    ],
)
def test_views_become_reshape(function: Function) -> None:
    graph = check(function, ("canonicalize_views",))
    assert set(graph.op_counts()) <= {"aten.reshape", "aten.add.Tensor", "aten.sym_size.int"}


def test_negative_dims_are_counted_from_the_front() -> None:
    graph = check(lambda x: x.transpose(-1, -2).transpose(-2, -1), ("canonicalize_views",))
    for node in graph.calls(torch.ops.aten.transpose.int):
        assert node.args[1:] == (2, 1) or node.args[1:] == (1, 2)


def test_a_swap_by_permute_is_a_transpose_and_a_rotation_is_not() -> None:
    graph = check(lambda x: x.permute(0, 2, 1).permute(0, 2, 1), ("canonicalize_views",))
    assert graph.op_counts()["aten.transpose.int"] == 2
    graph = graph_of(lambda x: x.permute(1, 2, 0).permute(2, 0, 1), torch.randn(4, 5, 6))
    apply(graph, "canonicalize_views")
    assert graph.op_counts()["aten.permute"] == 2


def test_matrix_transposes_are_transposes() -> None:
    graph = check(lambda x: (x.mT * 2.0).mT, ("canonicalize_views",))
    assert graph.op_counts()["aten.transpose.int"] == 2


def test_equal_calls_are_merged() -> None:
    graph = check(lambda x: x.cos() + x.cos() * x.cos(), ("common_subexpressions",))
    assert graph.op_counts()["aten.cos"] == 1


def test_calls_that_differ_in_a_number_type_are_not_merged() -> None:
    graph = check(lambda x: x.pow(2) + x.pow(3), ("common_subexpressions",))
    assert graph.op_counts()["aten.pow.Tensor_Scalar"] == 2


def test_the_two_zeros_are_not_merged() -> None:
    x = torch.randn(4, 5, 6)
    graph = graph_of(lambda x: 1 / (x.abs() * 0.0) + 1 / (x.abs() * -0.0), x)
    apply(graph, *CLEANUP)
    assert graph.op_counts()["aten.mul.Tensor"] == 2
    assert run(graph, x).isnan().all()


def test_random_calls_are_not_merged() -> None:
    graph = graph_of(lambda x: torch.rand_like(x) - torch.rand_like(x), torch.randn(4, 5, 6))
    apply(graph, "common_subexpressions")
    assert graph.op_counts()["aten.rand_like"] == 2


def test_constants_are_folded_into_weights() -> None:
    class Scaled(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            return x * (self.weight * 2.0).cos()

    model, x = Scaled(lambda x: x).eval(), torch.randn(4, 6)
    graph = capture(model, x, dynamic={"x": {0: "batch"}})
    before = run(graph, x)
    report = apply(graph, "fold_constants")
    assert report.sites("fold_constants") == 2
    assert graph.op_counts() == {"aten.mul.Tensor": 1}
    assert list(graph.weights) == ["folded.weight.0"] or len(graph.weights) == 1
    assert torch.equal(run(graph, x), before)
    assert torch.equal(model.weight * 2.0, model.weight + model.weight)


def test_large_constants_are_not_folded() -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1000, 300))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.cos()

    graph = capture(Large().eval(), torch.randn(4, 1000), dynamic={"x": {0: "batch"}})
    report = apply(graph, "fold_constants")
    (rejection,) = report.rejections("fold_constants")
    assert rejection.code == "too-large"


def checked(x: Tensor) -> Tensor:
    torch._assert_async((x > 0).all(), "all of x must be positive")
    return x + 1


def counted(x: Tensor) -> Tensor:
    positive = (x > 0).sum().item()
    torch._check(positive >= 2, lambda: "two must be positive")
    return x * 2


@pytest.mark.parametrize("function", [checked, counted])
def test_asserts_about_values_stay_and_run(function: Function) -> None:
    graph = graph_of(function, torch.rand(4, 5, 6) + 1)
    report = apply(graph, *CLEANUP)
    assert report.rejections("drop_asserts")[0].code == "assert-on-values"
    verify(graph)
    run(graph, torch.rand(3, 5, 6) + 1)
    with pytest.raises(RuntimeError):
        run(graph, -torch.rand(3, 5, 6) - 1)


def test_a_graph_with_asserts_about_values_is_not_served() -> None:
    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(31, 8)

        def forward(self, input_ids: Tensor) -> Tensor:
            torch._assert_async((input_ids > 0).any())
            return self.embed(input_ids)

    graph = capture(Checked().eval(), torch.ones((2, 5), dtype=torch.int64))
    (rejection,) = apply(graph, "insert_kv_cache").rejections("insert_kv_cache")
    assert rejection.code == "rows-mixed"
    assert "aten.any" in rejection.text
    assert rejection.source.startswith("test_cleanup.py:")


def test_all_of_cleanup_changes_no_bit_of_a_model() -> None:
    model = tiny_llama(layers=3)
    ids = torch.randint(0, 101, (2, 9))
    graph = capture(model)
    before = run(graph, ids)
    count = graph.num_calls()
    apply(graph, *CLEANUP)
    assert graph.num_calls() < count
    assert torch.equal(run(graph, ids), before)
    assert_idempotent(graph, CLEANUP)
