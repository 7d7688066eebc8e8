"""A plan under construction: instructions over virtual buffers, then memory and barriers.

`PlanBuilder` collects instructions whose operands are views into numbered buffers. `finish` gives
every temporary buffer a place in one arena (liveness, first fit), checks that no instruction leaves
its operands (`bounds.py`), converts the instructions to the native ABI, and sets a barrier only
where an instruction touches memory that an earlier one, since the last barrier, has written (or
read, if it writes).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

from graphopt.codegen.cpu.abi import Dim, Instr, Operand, Sym
from graphopt.codegen.cpu.bounds import check_bounds
from graphopt.codegen.cpu.dtypes import NATIVE_DTYPES
from graphopt.codegen.cpu.plan_steps import External, HostStep, NativeStep, Step, Temporary
from graphopt.codegen.cpu.views import Extent, View, total
from graphopt.errors import BackendError
from graphopt.record.calls import KernelCall

ALIGNMENT = 64
ARENA = 0
LOGITS = 1


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Instructions executed by one native call."""

    instrs: ctypes.Array[Instr]
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What the executable runs.

    places: buffer -> (base, fixed offset, offset per token), for host steps.
    externals: base number -> name, from base 1 on.
    """

    segments: tuple[Segment | HostStep, ...]
    places: dict[int, tuple[int, int, int]]
    externals: tuple[str, ...]
    arena_fixed: int
    arena_per_token: int
    barriers: int
    kernel_calls: tuple[KernelCall, ...]

    @property
    def host_steps(self) -> list[str]:
        """Ops that torch runs, for the report."""
        return [s.text for s in self.segments if isinstance(s, HostStep)]


@dataclass(eq=False)
class PlanBuilder:
    """Collects steps and buffers."""

    steps: list[Step] = field(default_factory=list)
    buffers: list[Temporary | External] = field(default_factory=list)
    value: str = ""
    """The value of the graph that is being lowered."""

    def temporary(self, extents: Sequence[Extent], itemsize: int) -> int:
        """A new arena buffer large enough for dense `extents`; returns its number.

        Raises BackendError for one that grows with anything but rows.
        """
        needed = total(extents, itemsize)
        if needed.sym not in (Sym.SYM_ONE, Sym.SYM_TOKENS, Sym.SYM_LOGIT_ROWS):
            raise BackendError(f"{self.value} grows with the number of requests or blocks")
        size = -(-needed.mult // ALIGNMENT) * ALIGNMENT
        is_fixed = needed.sym is Sym.SYM_ONE
        self.buffers.append(Temporary(size, 0) if is_fixed else Temporary(0, size))
        return len(self.buffers) - 1

    def external(self, name: str, size: Extent | None = None) -> int:
        """The buffer of a named external, made on first use. size: its bytes."""
        for number, buffer in enumerate(self.buffers):
            if isinstance(buffer, External) and buffer.name == name:
                return number
        self.buffers.append(External(name, size))
        return len(self.buffers) - 1

    def finish(self) -> Plan:
        """Place buffers, set barriers, convert."""
        externals = tuple(b.name for b in self.buffers if isinstance(b, External))
        base_of = {name: base for base, name in enumerate(externals, start=1)}
        places, fixed, per_token = self._place()
        for number, buffer in enumerate(self.buffers):
            if isinstance(buffer, External):
                places[number] = (base_of[buffer.name], 0, 0)
        segments: list[Segment | HostStep] = []
        pending: list[Instr] = []
        hazards = _Hazards(self.buffers, places)
        barriers = 0

        def flush() -> None:
            if pending:
                segments.append(Segment((Instr * len(pending))(*pending), len(pending)))
                pending.clear()
            hazards.clear()

        for step in self.steps:
            written = [v for v in step.operands[: step.writes] if v is not None]
            read = [v for v in step.operands[step.writes :] if v is not None]
            if isinstance(step, HostStep):
                flush()
                segments.append(step)
                continue
            check_bounds(step, self.buffers)
            wait = hazards.conflict(read, written)
            if wait:
                hazards.clear()
                barriers += 1
            hazards.add(read, written)
            pending.append(_instr(step, wait, places))
        flush()
        calls = tuple(_call(step) for step in self.steps)
        return Plan(tuple(segments), places, externals, fixed, per_token, barriers, calls)

    def _place(self) -> tuple[dict[int, tuple[int, int, int]], int, int]:
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for time, step in enumerate(self.steps):
            for view in step.operands:
                if view is not None and isinstance(self.buffers[view.buffer], Temporary):
                    first.setdefault(view.buffer, time)
                    last[view.buffer] = time
        regions = (_FirstFit(), _FirstFit())
        places: dict[int, tuple[int, int, int]] = {}
        raw: dict[int, tuple[int, int]] = {}
        for number in sorted(first, key=lambda n: (first[n], n)):
            buffer = self.buffers[number]
            assert isinstance(buffer, Temporary)
            kind = 1 if buffer.bytes_per_token else 0
            size = buffer.bytes_per_token or buffer.fixed_bytes
            raw[number] = (kind, regions[kind].take(size, first[number], last[number]))
        fixed, per_token = regions[0].peak, regions[1].peak
        for number, (kind, offset) in raw.items():
            places[number] = (ARENA, fixed, offset) if kind else (ARENA, offset, 0)
        return places, fixed, per_token


def _call(step: Step) -> KernelCall:
    if isinstance(step, HostStep):
        return KernelCall(step.value, step.op, False)
    return KernelCall(step.value, step.op.name.removeprefix("OP_").lower(), True)


class _FirstFit:
    """Offsets for intervals of time; two that overlap in time never overlap in space."""

    def __init__(self) -> None:
        self._taken: list[tuple[int, int, int]] = []
        self.peak = 0

    def take(self, size: int, start: int, end: int) -> int:
        live = sorted((o, s) for o, s, until in self._taken if until >= start)
        offset = 0
        for other, length in live:
            if offset + size <= other:
                break
            offset = max(offset, other + length)
        self._taken = [entry for entry in self._taken if entry[2] >= start]
        self._taken.append((offset, size, end))
        self.peak = max(self.peak, offset + size)
        return offset


class _Hazards:
    """Memory read and written since the last barrier."""

    def __init__(
        self, buffers: Sequence[Temporary | External], places: dict[int, tuple[int, int, int]]
    ) -> None:
        self._buffers, self._places = buffers, places
        self._read: list[tuple[int, int, int]] = []
        self._written: list[tuple[int, int, int]] = []

    def _range(self, view: View) -> tuple[int, int, int]:
        """(address space, first, end): the whole buffer, in its own space."""
        buffer = self._buffers[view.buffer]
        base, fixed, per_token = self._places[view.buffer]
        if isinstance(buffer, External):
            return (base, 0, 1)
        if buffer.bytes_per_token:
            return (-1, per_token, per_token + buffer.bytes_per_token)
        return (-2, fixed, fixed + buffer.fixed_bytes)

    def conflict(self, read: Sequence[View], written: Sequence[View]) -> bool:
        new_read = [self._range(v) for v in read]
        new_written = [self._range(v) for v in written]
        return (
            _overlap(new_read, self._written)
            or _overlap(new_written, self._written)
            or _overlap(new_written, self._read)
        )

    def add(self, read: Sequence[View], written: Sequence[View]) -> None:
        self._read += [self._range(v) for v in read]
        self._written += [self._range(v) for v in written]

    def clear(self) -> None:
        self._read.clear()
        self._written.clear()


def _overlap(left: Sequence[tuple[int, int, int]], right: Sequence[tuple[int, int, int]]) -> bool:
    return any(a[0] == b[0] and a[1] < b[2] and b[1] < a[2] for a in left for b in right)


def _instr(step: NativeStep, wait: bool, places: dict[int, tuple[int, int, int]]) -> Instr:
    instr = Instr(op=step.op, barrier=int(wait))
    instr.absent_operands()
    for i, view in enumerate(step.operands):
        if view is not None:
            base, fixed, per_token = places[view.buffer]
            dtype = NATIVE_DTYPES.get(view.dtype)
            if dtype is None:
                raise BackendError(f"{step.op.name} of {step.value} has no kernel for {view.dtype}")
            instr.operands[i] = Operand(base, dtype, fixed + view.offset, per_token)
    for i, extent in enumerate(step.dims):
        instr.dims[i] = Dim(extent.mult, extent.sym)
    for i, row in enumerate(step.strides):
        for j, stride in enumerate(row):
            instr.strides[i][j] = stride
    for i, value in enumerate(step.attrs_i):
        instr.attrs_i[i] = value
    for i, real in enumerate(step.attrs_f):
        instr.attrs_f[i] = real
    return instr
