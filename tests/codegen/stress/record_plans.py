"""Writes real plans with all they read, for `stress.cpp`: `python record_plans.py FILE`.

A plan is recorded as it is about to run: its instructions, the extents of its step, and the memory
behind each base. What only the plan's owner writes (arena, logits, caches) is marked as private;
weights and step inputs are shared by all threads of the driver, as they are by those of a program.

File: int64 count of plans; for each the counts of instructions, of bases and of symbols, the
symbols, then a base after the other (bytes, 1 for a private one, its data), then the instructions.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path += [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

from helpers.serving_steps import Steps
from helpers.tiny_models import tiny_llama
from rule_cases import CASES
from serving_graph import VOCABULARY, ServingGraph

import graphopt
from graphopt.codegen.cpu.abi import Instr, NativeLibrary, Sym
from graphopt.codegen.cpu.backend import CpuBackend
from graphopt.codegen.cpu.build import load_library
from graphopt.codegen.cpu.executable import CpuServing
from graphopt.codegen.cpu.plan import ARENA
from graphopt.ops import linear_wq


class Recorder:
    """Stands in for an executable's library: keeps the next plan, then runs it."""

    def __init__(self, executable: CpuServing, library: NativeLibrary) -> None:
        assert executable.plan.host_steps == []
        self._executable, self._library = executable, library
        self.check_step = library.check_step
        self.recorded = b""
        executable._library = self  # type: ignore[assignment]

    def run(self, instrs: Any, bases: Any, syms: Any, threads: int) -> None:
        """As `NativeLibrary.run`."""
        header = struct.pack("<3q", len(instrs), len(bases), Sym.SYM_COUNT)
        memory = b"".join(self._base(base, bases[base], syms) for base in range(len(bases)))
        self.recorded = header + bytes(syms) + memory + bytes(instrs)
        self._library.run(instrs, bases, syms, threads)

    def _base(self, base: int, address: int | None, syms: Any) -> bytes:
        executable = self._executable
        if base == ARENA:
            plan = executable.plan
            size = plan.arena_fixed + plan.arena_per_token * syms[Sym.SYM_TOKENS]
            return struct.pack("<2q", size, 1) + bytes(size)
        name = executable.plan.externals[base - 1]
        weight = name.partition(":")[2]
        is_matrix = name.startswith("matrix:")
        tensor = executable.matrices[weight].data if is_matrix else executable._host_tensors[base]
        size = tensor.numel() * tensor.element_size()
        is_private = "logits" in name or "cache" in name
        return struct.pack("<2q", size, is_private) + ctypes.string_at(address or 0, size)


def plans_of(executable: Any, steps: Sequence[Sequence[int]]) -> Iterator[bytes]:
    """One plan a step; steps: rows of each request."""
    assert isinstance(executable, CpuServing)
    recorder = Recorder(executable, load_library())
    lengths = [sum(counts) for counts in zip(*steps, strict=True)]
    prompts = [torch.randint(0, VOCABULARY, (n,)).tolist() for n in lengths]
    requests = Steps(executable, prompts, block_size=16)
    for storage in requests.cache.tensors:  # type: ignore[attr-defined]
        storage.zero_()
    for counts in steps:
        requests.run(counts)
        yield recorder.recorded


def low_bit(activation: str) -> Any:
    """Two low-bit layers with an elementary function between."""
    case = ServingGraph()
    value = case.x(64)
    for number in range(2):
        codes = case.weight(torch.randint(0, 256, (64, 32), dtype=torch.uint8), f"{number}.codes")
        scale = case.weight((torch.rand(64, 2) * 0.02).half(), f"{number}.scale")
        settings: dict[str, Any] = {"bits": 4, "group": 32, "offset": 8, "activation": activation}
        value = case.emit(linear_wq.SPEC.overload, value, codes, scale, **settings)
        value = case.emit(torch.ops.aten.silu.default, value)
    return CpuBackend(load_library(), 2).lower_serving(case.finish(value), None, None)


def recorded() -> Iterator[bytes]:
    """Prompts, chunks and decoding, with contexts that are cut into several parts."""
    steps = [[90, 40, 1], [250, 1, 30], [1, 1, 1]]
    for model in (tiny_llama(), tiny_llama().bfloat16()):
        yield from plans_of(graphopt.compile(model, threads=2).executable, steps)
    for activation in ("float", "int8"):
        yield from plans_of(low_bit(activation), [[9, 30, 1], [1, 1, 1]])
    for builds in CASES.values():
        case = ServingGraph()
        graph = case.finish(builds[0](case))
        executable = CpuBackend(load_library(), 2).lower_serving(graph, None, None)
        yield from plans_of(executable, [[5, 3]])


def main() -> None:
    """Write all plans to the file that was named."""
    assert ctypes.sizeof(Instr) % 8 == 0
    torch.manual_seed(0)
    plans = list(recorded())
    Path(sys.argv[1]).write_bytes(struct.pack("<q", len(plans)) + b"".join(plans))


if __name__ == "__main__":
    main()
