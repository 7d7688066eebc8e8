"""Runs kernels on plans that are wrong, each in a child process: a sanitizer must end every one.

Plans like these are refused when they are made (`codegen/cpu/bounds.py`) and steps like these by
`native/step.cpp`; here the kernels are called directly, with those checks left out.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from kernel_cases import CASES, KernelCase
from native_plan import execute, instruction

from graphopt.codegen.cpu.abi import Instr, Op


def prepared(op: Op) -> tuple[KernelCase, Instr, list[int]]:
    case = CASES[op]()
    instr, bases = instruction(
        op, case.operands, case.dims, case.strides, case.attrs_i, case.attrs_f
    )
    return case, instr, bases


def block_table() -> None:
    """A block behind the last one."""
    case = CASES[Op.OP_PAGED_ATTENTION]()
    case.run(4, torch.tensor([[2]]))


def slot() -> None:
    """The first slot behind the cache, which is said to be larger than it is."""
    case, instr, _ = prepared(Op.OP_KV_WRITE)
    operands = [*case.operands[:4], torch.tensor([7, 8, 5])]
    bases = [t.data_ptr() for t in operands if t is not None]
    instr.attrs_i[1] = 100
    execute([instr], bases)


def width() -> None:
    """One more column than the weight has."""
    _, instr, bases = prepared(Op.OP_RMS_NORM)
    instr.dims[2].mult += 1
    execute([instr], bases)


def alignment() -> None:
    """Numbers that begin in the middle of one."""
    _, instr, bases = prepared(Op.OP_GATHER_ROWS)
    instr.dims[0].mult = 2
    instr.operands[2].offset = 3
    execute([instr], bases)


WRONG = {
    "block_table": block_table,
    "slot": slot,
    "width": width,
    "alignment": alignment,
}


def main() -> None:
    """Say of each whether its process was ended."""
    for name, run in WRONG.items():
        child = os.fork()
        if child == 0:
            run()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(f"{name}: {'ended' if status else 'not noticed'}", flush=True)


if __name__ == "__main__":
    main()
