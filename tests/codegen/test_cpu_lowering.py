"""Lowering refuses what the kernels would read wrongly; torch or the reference backend runs it."""

from __future__ import annotations

import pytest
import torch
from native_plan import execute, instruction
from torch import Tensor, nn

import graphopt
from graphopt.codegen.backend import check_weights
from graphopt.codegen.cpu.abi import Op
from graphopt.codegen.cpu.executable import CpuServing
from graphopt.codegen.cpu.packing import pack_dense
from graphopt.errors import BackendError
from graphopt.program.program import Program

WIDTH, VOCABULARY = 48, 29
IDS = torch.ones((2, 8), dtype=torch.int64)


class Layer(nn.Module):
    """Ids -> embedding -> one layer made by a subclass -> logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(input_ids)))

    def layer(self, x_BSD: Tensor) -> Tensor:
        raise AssertionError


class ScalarNorm(Layer):
    """A root-mean-square norm with one weight for all columns."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def layer(self, x_BSD: Tensor) -> Tensor:
        return torch.ops.graphopt.rms_norm(x_BSD, self.weight, eps=1e-5)


class ExpandedLayerNorm(Layer):
    """A layer norm whose weight is one number, expanded: its stride is 0."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def layer(self, x_BSD: Tensor) -> Tensor:
        weight = self.weight.expand(WIDTH)
        return nn.functional.layer_norm(x_BSD, (WIDTH,), weight, weight)


class ScalarBias(Layer):
    """A linear layer with one bias for all columns."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.inner, self.bias = nn.Linear(WIDTH, WIDTH, bias=False), nn.Parameter(bias)

    def layer(self, x_BSD: Tensor) -> Tensor:
        return nn.functional.linear(x_BSD, self.inner.weight, self.bias)


class Unbound(Layer):
    """Parts taken apart along an axis of their own, in the middle, at the end."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def layer(self, x_BSD: Tensor) -> Tensor:
        parts = x_BSD.unflatten(-1, (4, 3, 4)).unbind(self.axis)
        whole = torch.cat([part * (i + 1) for i, part in enumerate(parts)], -1)
        return whole.flatten(2)


def close_to_eager(model: Layer) -> Program:
    # Folded, an expanded weight would be a weight for every column.
    program = graphopt.compile(model.eval(), IDS, disable=["fold_constants"])
    assert program.serving is not None
    assert program.report.notes == []
    for shape in ((1, 1), (3, 7)):
        ids = torch.randint(0, VOCABULARY, shape)
        torch.testing.assert_close(program(ids), model(ids).detach(), rtol=1e-4, atol=1e-5)
    return program


@pytest.mark.parametrize("cls", [ScalarNorm, ExpandedLayerNorm, ScalarBias])
def test_a_weight_that_is_broadcast(cls: type[Layer]) -> None:
    # Beside the one weight lies what must not be read.
    memory = torch.full((WIDTH,), float("nan"))
    memory[0] = 1.7
    model = cls(memory[:1])  # type: ignore[call-arg]
    program = close_to_eager(model)
    used = {instr.op for instr in program.executable._instrs()}  # type: ignore[attr-defined]
    assert not used & {Op.OP_RMS_NORM, Op.OP_LAYER_NORM}


class MixedCat(Layer):
    """Parts of two dtypes side by side; the result is then cast back."""

    def __init__(self, first: torch.dtype, second: torch.dtype) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.head = nn.Linear(2 * WIDTH, VOCABULARY)

    def layer(self, x_BSD: Tensor) -> Tensor:
        both = [(3 * x_BSD).to(self.first), (5 * x_BSD).to(self.second)]
        return torch.cat(both, -1).to(torch.float32)


@pytest.mark.parametrize("second", [torch.float16, torch.bfloat16, torch.int64, torch.float32])
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16, torch.int32])
def test_cat_of_two_dtypes(first: torch.dtype, second: torch.dtype) -> None:
    program = close_to_eager(MixedCat(first, second))
    assert isinstance(program.executable, CpuServing)
    on_host = [text for text in program.executable.plan.host_steps if "cat" in text]
    assert bool(on_host) == (first != second)


@pytest.mark.parametrize("axis", [2, 3, -1])
def test_unbind_is_views(axis: int) -> None:
    close_to_eager(Unbound(axis))


def test_a_weight_for_every_column_takes_the_kernel() -> None:
    program = close_to_eager(ScalarNorm(torch.randn(WIDTH)))
    used = {instr.op for instr in program.executable._instrs()}  # type: ignore[attr-defined]
    assert Op.OP_RMS_NORM in used


@pytest.mark.parametrize("wrong", [-1, 5])
def test_a_row_that_is_not_in_the_table_is_said(wrong: int) -> None:
    weight = pack_dense(torch.randn(5, 4))
    out = torch.full((1, 4), float("nan"))
    ids = torch.tensor([wrong])
    attributes = (weight.kind, weight.n, 0, 0, 0)
    instr, bases = instruction(
        Op.OP_EMBED, [out, ids, weight.data], (1, 4), [[4], [1], []], attributes, (1.0,)
    )
    with pytest.raises(BackendError, match=r"OP_EMBED.*token id or a position is out of range"):
        execute([instr], bases)
    assert out.isnan().all()


def test_a_graph_whose_weights_were_taken_over_is_not_called_packed() -> None:
    program = graphopt.compile(ScalarNorm(torch.randn(WIDTH)).eval(), IDS)
    with pytest.raises(BackendError, match="has no data: another program took it over"):
        check_weights(program.graph)


class Codes(Layer):
    """A linear layer whose weight has the name that low-bit codes have."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def layer(self, x_BSD: Tensor) -> Tensor:
        return nn.functional.linear(x_BSD, self.codes)


def test_a_dense_weight_may_be_called_codes() -> None:
    close_to_eager(Codes())


class FarSlice(Layer):
    """A slice that begins before its axis does."""

    def layer(self, x_BSD: Tensor) -> Tensor:
        return x_BSD + x_BSD[..., -10 * WIDTH : 4].sum(-1, keepdim=True)


def test_a_slice_begins_with_its_axis() -> None:
    close_to_eager(FarSlice())
