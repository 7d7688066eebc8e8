"""One valid instruction of every native op, and what each of its operands may hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from native_plan import DTYPES, execute, instruction
from torch import Tensor

from graphopt.codegen.cpu.abi import BinaryKind, Op, UnaryKind
from graphopt.codegen.cpu.packing import pack_dense

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})
INDEX = frozenset({torch.int64})
ANY = frozenset(DTYPES)
PACKED: frozenset[torch.dtype] = frozenset()
"""A weight in a kernel's layout: its kind says what it holds, not its dtype."""


@dataclass(frozen=True)
class KernelCase:
    """takes: per operand the dtypes its kernel takes when the others are as given."""

    op: Op
    operands: list[Tensor | None]
    dims: list[int]
    strides: list[list[int]]
    takes: list[frozenset[torch.dtype]]
    attrs_i: list[int] = field(default_factory=list)
    attrs_f: list[float] = field(default_factory=list)
    writes: int = 1
    syms: dict[str, int] = field(default_factory=dict)

    def run(self, replaced: int = -1, by: Tensor | None = None, number: int | None = None) -> None:
        """Execute it; operand `replaced` is tensor `by`, or of the dtype called `number`."""
        operands = list(self.operands)
        if by is not None:
            operands[replaced] = by
        instr, bases = instruction(
            self.op, operands, self.dims, self.strides, self.attrs_i, self.attrs_f
        )
        if number is not None:
            instr.operands[replaced].dtype = number
        execute([instr], bases, 2, **self.syms)


def nan(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"))


def embed() -> KernelCase:
    weight = pack_dense(torch.randn(5, 8))
    ids = torch.tensor([4, 0, 2])
    attributes = [int(weight.kind), weight.n, 0, 0, 0]
    operands: list[Tensor | None] = [nan(3, 8), ids, weight.data]
    takes = [FLOATS, INDEX, PACKED]
    return KernelCase(Op.OP_EMBED, operands, [3, 8], [[8], [1], []], takes, attributes, [1.0])


def linear() -> KernelCase:
    weight = pack_dense(torch.randn(5, 8))
    operands: list[Tensor | None] = [nan(3, 5), torch.randn(3, 8), weight.data, torch.randn(5)]
    attributes = [int(weight.kind), 0, 1, 0, 0]
    takes = [FLOATS, FLOATS, PACKED, FLOATS]
    return KernelCase(Op.OP_LINEAR, operands, [3, 5, 8], [[5], [8], [], []], takes, attributes)


def norm(op: Op, weights: int) -> KernelCase:
    operands: list[Tensor | None] = [nan(3, 2, 8), torch.randn(3, 2, 8)]
    operands += [torch.randn(8) for _ in range(weights)]
    takes = [FLOATS] * len(operands)
    return KernelCase(op, operands, [3, 2, 8], [[16, 8]] * 2, takes, [0], [1e-5, 0.0])


def rope() -> KernelCase:
    operands: list[Tensor | None] = [nan(3, 2, 8), torch.randn(3, 2, 8)]
    operands += [torch.randn(3, 4), torch.randn(3, 4)]
    strides = [[16, 8], [16, 8], [4], [4]]
    return KernelCase(Op.OP_ROPE, operands, [3, 2, 8, 4], strides, [FLOATS] * 4, [0, 0])


def kv_write() -> KernelCase:
    operands: list[Tensor | None] = [nan(2, 4, 2, 8), nan(2, 4, 2, 6)]
    operands += [torch.randn(3, 2, 8), torch.randn(3, 2, 6), torch.tensor([7, 0, 5])]
    strides = [[], [], [16, 8], [12, 6]]
    takes = [*[FLOATS] * 4, INDEX]
    return KernelCase(Op.OP_KV_WRITE, operands, [3, 2, 8, 6], strides, takes, [4, 2], writes=2)


def paged_attention() -> KernelCase:
    operands: list[Tensor | None] = [nan(3, 4, 6), torch.randn(3, 4, 8)]
    operands += [torch.randn(2, 4, 2, 8), torch.randn(2, 4, 2, 6)]
    operands += [torch.tensor([[1]]), torch.tensor([0, 3]), torch.tensor([3]), torch.randn(4)]
    same = frozenset({torch.float32})  # both caches have one dtype
    takes = [FLOATS, FLOATS, same, same, INDEX, INDEX, INDEX, FLOATS]
    syms = {"SYM_TOKENS": 3, "SYM_REQUESTS": 1, "SYM_BLOCK_COLUMNS": 1}
    strides = [[24, 6], [32, 8]]
    attributes, floats = [4, 2, 0], [0.3, 0.0, 0.0, 0.0]
    return KernelCase(
        Op.OP_PAGED_ATTENTION, operands, [3, 2, 8, 6], strides, takes, attributes, floats, syms=syms
    )


def glu() -> KernelCase:
    operands: list[Tensor | None] = [nan(3, 8), torch.randn(3, 8), torch.randn(3, 8)]
    return KernelCase(Op.OP_GLU, operands, [3, 8], [[8]] * 3, [FLOATS] * 3, [0])


def binary() -> KernelCase:
    operands: list[Tensor | None] = [nan(3, 8), torch.randn(3, 8), torch.randn(3, 8)]
    kind = [int(BinaryKind.BINARY_ADD)]
    return KernelCase(Op.OP_BINARY, operands, [1, 1, 3, 8], [[0, 0, 8, 1]] * 3, [FLOATS] * 3, kind)


def unary() -> KernelCase:
    operands: list[Tensor | None] = [nan(3, 8), torch.randn(3, 8)]
    kind = [int(UnaryKind.UNARY_NEG)]
    return KernelCase(Op.OP_UNARY, operands, [1, 1, 3, 8], [[0, 0, 8, 1]] * 2, [FLOATS] * 2, kind)


def gather_rows() -> KernelCase:
    operands: list[Tensor | None] = [nan(3, 8), torch.randn(5, 8), torch.tensor([4, 0, 2])]
    takes = [FLOATS, FLOATS, INDEX]
    return KernelCase(Op.OP_GATHER_ROWS, operands, [3, 8, 5], [[8], [8], [1]], takes)


CASES: dict[Op, Callable[[], KernelCase]] = {
    Op.OP_EMBED: embed,
    Op.OP_LINEAR: linear,
    Op.OP_RMS_NORM: lambda: norm(Op.OP_RMS_NORM, 1),
    Op.OP_LAYER_NORM: lambda: norm(Op.OP_LAYER_NORM, 2),
    Op.OP_ROPE: rope,
    Op.OP_KV_WRITE: kv_write,
    Op.OP_PAGED_ATTENTION: paged_attention,
    Op.OP_GLU: glu,
    Op.OP_BINARY: binary,
    Op.OP_UNARY: unary,
    Op.OP_GATHER_ROWS: gather_rows,
}
OPS = [op for op in Op if op is not Op.OP_COUNT]
