"""Every native op, operand by operand: dtypes that are refused, rows that data may name."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import ANY, CASES, INDEX, OPS, PACKED
from native_plan import DTYPES, call, execute, instruction
from torch import Tensor

from graphopt.codegen.cpu.abi import Op, UnaryKind
from graphopt.errors import BackendError

OPERANDS = [(op, i) for op in OPS for i, takes in enumerate(CASES[op]().takes) if takes != PACKED]
INDEX_OPERANDS = {(op, i) for op, i in OPERANDS if CASES[op]().takes[i] == INDEX}
# Followed without looking: the step's check has looked (test_step_check.py).
CHECKED_BY_STEP = {(Op.OP_PAGED_ATTENTION, operand) for operand in (4, 5, 6)}
UNKNOWN = (-1, len(DTYPES), 99)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8).clone()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_op_has_a_case_and_it_runs(op: Op) -> None:
    case = CASES[op]()
    case.run()
    assert all(t is None or t.isfinite().any() for t in case.operands[: case.writes])


@pytest.mark.parametrize(("op", "operand"), OPERANDS, ids=lambda value: str(value))
def test_dtypes_of_operands(op: Op, operand: int) -> None:
    for dtype in sorted(ANY, key=str):
        case = CASES[op]()
        given = case.operands[operand]
        assert given is not None
        if dtype in case.takes[operand]:
            case.run(operand, given.to(dtype))
            continue
        before = [bits(t) for t in case.operands[: case.writes] if t is not None]
        with pytest.raises(BackendError, match=op.name):
            case.run(operand, torch.ones_like(given, dtype=dtype))
        after = [bits(t) for t in case.operands[: case.writes] if t is not None]
        assert all(map(torch.equal, before, after))


@pytest.mark.parametrize(("op", "operand"), OPERANDS, ids=lambda value: str(value))
@pytest.mark.parametrize("number", UNKNOWN)
def test_numbers_that_are_no_dtype(op: Op, operand: int, number: int) -> None:
    with pytest.raises(BackendError, match=op.name):
        CASES[op]().run(operand, number=number)


def test_no_dtype_twice_is_none() -> None:
    """Two operands of the same unknown dtype are not "a copy that keeps it"."""
    case = CASES[Op.OP_GATHER_ROWS]()
    instr, bases = instruction(case.op, case.operands, case.dims, case.strides)
    instr.operands[0].dtype = instr.operands[1].dtype = 99
    with pytest.raises(BackendError, match="OP_GATHER_ROWS"):
        execute([instr], bases)


@pytest.mark.parametrize("target", list(DTYPES))
@pytest.mark.parametrize("source", list(DTYPES))
def test_copies_take_all_but_float_to_integer(target: torch.dtype, source: torch.dtype) -> None:
    x, out = torch.ones(5, dtype=source), torch.zeros(5, dtype=target)
    arguments = (Op.OP_UNARY, [out, x], [1, 1, 1, 5], [[0, 0, 0, 1]] * 2, [UnaryKind.UNARY_COPY])
    if source.is_floating_point and not target.is_floating_point:
        with pytest.raises(BackendError, match="OP_UNARY"):
            call(*arguments)
    else:
        call(*arguments)
        assert torch.equal(out, x.to(target))


@pytest.mark.parametrize(
    ("op", "operand"), sorted(INDEX_OPERANDS - CHECKED_BY_STEP), ids=lambda value: str(value)
)
def test_rows_that_data_name_are_bounded(op: Op, operand: int) -> None:
    """One bad number at a time, in every place of the operand."""
    given = CASES[op]().operands[operand]
    assert given is not None
    # A negative slot is skipped.
    negative = [] if op is Op.OP_KV_WRITE else [-1, -(2**63)]
    for place in range(len(given)):
        for wrong in (8, 10**12, 2**63 - 1, *negative):
            bad = given.clone()
            bad[place] = wrong
            with pytest.raises(BackendError, match=op.name):
                CASES[op]().run(operand, bad)


def test_every_index_operand_is_bounded_somewhere() -> None:
    assert CHECKED_BY_STEP < INDEX_OPERANDS
    bounded = {Op.OP_EMBED, Op.OP_GATHER_ROWS, Op.OP_KV_WRITE}
    assert {op for op, _ in INDEX_OPERANDS - CHECKED_BY_STEP} == bounded
