"""Copies stay where a memory layout is read, and where the copy itself is what is returned."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from helpers.run_graph import CLEANUP, apply, run
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.codegen.reference import ReferenceBackend
from graphopt.ir.graph import Graph
from graphopt.passes.cleanup.layout import reads_layout

aten = torch.ops.aten
Function = Callable[[Tensor], Tensor]


class Wrapped(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.table = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def graph_of(function: Function, x: Tensor) -> Graph:
    return capture(Wrapped(function).eval(), x, dynamic=False)


# Steps on a [4, 6] or [6, 4] tensor: copies, ops that look like none, and moves.
STEPS: list[Function] = [
    lambda x: x.t(),
    lambda x: x.contiguous(),
    lambda x: x.clone(),
    lambda x: x.clone(memory_format=torch.contiguous_format),
    lambda x: x * 1.0,
    lambda x: x.to(torch.float32),
    lambda x: x.to(torch.float32, copy=True),
    lambda x: x.cos(),
    lambda x: nn.functional.dropout(x, 0.5, training=False),
    lambda x: x.expand(2, *x.shape)[1],
    lambda x: x.reshape(-1).reshape(x.shape),
]
# What the layout reaches. Each gives what it can for the layout that it meets.
READERS: list[Function] = [
    lambda x: x.view(24),
    lambda x: x.view_as(x.new_zeros(2, 12)),
    lambda x: x.as_strided((3, 5), (5, 1), 2),
    lambda x: x.view(torch.int32).float(),
    lambda x: x.view(torch.int16).float(),
    lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)))).flatten(),
    lambda x: x.unfold(0, 2, 1),
    lambda x: x * float(x.stride(0)),
]


@pytest.mark.parametrize("seed", range(24))
def test_chains_of_copies_before_a_reader(seed: int) -> None:
    """Whatever runs before the passes runs after them, with the same bits."""
    choose = random.Random(seed)
    x = torch.randn(4, 6)
    while True:
        steps = [choose.choice(STEPS) for _ in range(choose.randint(2, 6))]
        reader = choose.choice(READERS)

        def chain(x: Tensor, steps: list[Function] = steps, reader: Function = reader) -> Tensor:
            for step in steps:
                x = step(x)
            return reader(x)

        try:
            chain(x)
            break
        except RuntimeError:
            continue  # eager refuses this layout, too
    graph = graph_of(chain, x)
    before = run(graph, x)
    torch.testing.assert_close(before, chain(x), equal_nan=True)
    for passes in (("remove_noops",), CLEANUP):
        changed = graph.copy()
        apply(changed, *passes)
        assert torch.equal(run(changed, x).nan_to_num(), before.nan_to_num()), passes


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (lambda x: x.t().contiguous().as_strided((4,), (1,)), 1),
        (lambda x: x.t().contiguous().cos().as_strided((4,), (1,)), 1),
        (lambda x: x.t().contiguous().cos().t().contiguous().as_strided((4,), (1,)), 1),
        (lambda x: x.t().contiguous().view(24) + 1, 0),
        (lambda x: x.t().contiguous().view_as(x) + 1, 0),
        (lambda x: x.t().contiguous().unfold(0, 2, 1) + 1, 0),
        (lambda x: x.t().contiguous() @ x, 0),
        (lambda x: x.t().contiguous().slice_scatter(x.t()[:, :2], 1, 0, 2), 0),
    ],
)
def test_a_copy_stays_exactly_where_it_is_needed(function: Function, kept: int) -> None:
    x = torch.randn(4, 6)
    graph = graph_of(function, x)
    before = run(graph, x)
    apply(graph, *CLEANUP)
    assert torch.equal(run(graph, x), before)
    assert graph.op_counts()["aten.contiguous"] == kept


@pytest.mark.parametrize(
    ("function", "is_held"),
    [
        (lambda x: x.clone(), True),
        (lambda x: (x * 1.0).t(), True),
        (lambda x: x.cos().clone(), False),
    ],
)
def test_the_caller_gets_memory_of_his_own(function: Function, is_held: bool) -> None:
    x = torch.randn(4, 6)
    graph = graph_of(function, x)
    report = apply(graph, *CLEANUP)
    assert [r.code for r in report.rejections("remove_noops")] == ["copy-returned"] * is_held
    kept = x.clone()
    ReferenceBackend().lower(graph)(x)[0].zero_()
    assert torch.equal(x, kept)


def test_a_weight_that_is_returned_is_a_copy() -> None:
    class Table(Wrapped):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.cos(), self.table.clone()

    model = Table(lambda x: x).eval()
    graph = capture(model, torch.randn(4, 6), dynamic=False)
    apply(graph, *CLEANUP)
    ReferenceBackend().lower(graph)(torch.randn(4, 6))[1].zero_()
    assert model.table.abs().sum() > 0


def test_folding_a_constant_keeps_a_layout_that_is_read() -> None:
    class Strided(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.table.t().as_strided((4, 6), (1, 4))

    model, x = Strided(lambda x: x).eval(), torch.randn(4, 6)
    graph = capture(model, x, dynamic=False)
    before = run(graph, x)
    apply(graph, *CLEANUP)
    assert torch.equal(run(graph, x), before)


def _layouts(x: Tensor) -> list[Tensor]:
    """The same values, row-major, column-major and with gaps."""
    order = list(range(x.ndim))[::-1]
    gaps = torch.zeros(*x.shape[:-1], 3 * x.shape[-1], dtype=x.dtype)[..., ::3]
    return [x.contiguous(), x.permute(order).contiguous().permute(order), gaps.copy_(x)]


VIEWS: list[tuple[torch._ops.OpOverload, tuple[object, ...]]] = [
    (aten.reshape.default, ([24],)),
    (aten.flatten.using_ints, ()),
    (aten.ravel.default, ()),
    (aten.unflatten.int, (1, [2, 3])),
    (aten.expand.default, ([2, 4, 6],)),
    (aten.broadcast_to.default, ([2, 4, 6],)),
    (aten.transpose.int, (0, 1)),
    (aten.permute.default, ([1, 0],)),
    (aten.movedim.intlist, ([0], [1])),
    (aten.select.int, (1, 2)),
    (aten.slice.Tensor, (1, 1, 5, 2)),
    (aten.narrow.default, (1, 1, 3)),
    (aten.unsqueeze.default, (1,)),
    (aten.squeeze.dims, ([0],)),
    (aten.diagonal.default, ()),
    (aten.unfold.default, (1, 2, 2)),
    (aten.split.Tensor, (2, 1)),
    (aten.split_with_sizes.default, ([2, 4], 1)),
    (aten.chunk.default, (2, 1)),
    (aten.unbind.int, (1,)),
    (aten.tensor_split.indices, ([2], 1)),
    (aten.to.dtype, (torch.float32,)),
    (aten.t.default, ()),
    (aten.view.default, ([24],)),
    (aten._unsafe_view.default, ([24],)),
    (aten.view.dtype, (torch.int16,)),
    (aten.view_as.default, (torch.empty(24),)),
    (aten.as_strided.default, ([24], [1])),
    (aten._reshape_alias.default, ([24], [1])),
    (aten.sym_stride.int, (0,)),
]


@pytest.mark.parametrize(("target", "args"), VIEWS, ids=[str(target) for target, _ in VIEWS])
def test_readers_of_layouts_are_the_ops_whose_result_depends_on_one(
    target: torch._ops.OpOverload, args: tuple[object, ...]
) -> None:
    outcomes = []
    for x in _layouts(torch.arange(24.0).view(4, 6)):
        try:
            result = target(x, *args)
        except RuntimeError as error:
            result = [torch.tensor(len(str(error)))]
        parts = result if isinstance(result, (list, tuple)) else [result]
        outcomes.append([p.tolist() if isinstance(p, Tensor) else p for p in parts])
    node = torch.fx.Graph().call_function(target, ())
    node.meta["val"] = torch.empty(1)
    node.args = (torch.fx.Graph().placeholder("x"),)
    node.args[0].meta["val"] = torch.empty(1)
    assert reads_layout(node) == any(outcome != outcomes[0] for outcome in outcomes)
