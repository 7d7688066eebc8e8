"""ctypes mirror of `native/abi.h`, and the loaded native library.

A plan is a ctypes array of `Instr`; `NativeLibrary.run` executes it in one C call, without the
interpreter lock. What each op reads from an `Instr` is written beside `enum Op` in `native/abi.h`;
the classes here repeat its fields and numbers (a test compares the two).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

from graphopt.errors import BackendError, CapacityError, ScoreRangeError
from graphopt.ops import paged_attention

ABI_VERSION = 2
MAX_OPERANDS = 8
MAX_DIMS = 4
# What `go_run` returns beside the number of an instruction (kernel.h).
BAD_THREADS, NO_MEMORY, NO_THREAD = -1, -2, -3


class DType(IntEnum):
    F32 = 0
    BF16 = 1
    F16 = 2
    I64 = 3
    I32 = 4
    U8 = 5
    I8 = 6
    BOOL = 7


class Sym(IntEnum):
    SYM_ONE = 0
    SYM_TOKENS = 1
    SYM_REQUESTS = 2
    SYM_LOGIT_ROWS = 3
    SYM_BLOCK_COLUMNS = 4
    SYM_COUNT = 5


class Op(IntEnum):
    OP_EMBED = 0
    OP_LINEAR = 1
    OP_RMS_NORM = 2
    OP_LAYER_NORM = 3
    OP_ROPE = 4
    OP_KV_WRITE = 5
    OP_PAGED_ATTENTION = 6
    OP_GLU = 7
    OP_BINARY = 8
    OP_UNARY = 9
    OP_GATHER_ROWS = 10
    OP_COUNT = 11


class NormCast(IntEnum):
    ROUND_FIRST = 0
    ROUND_LAST = 1


class RopeStyle(IntEnum):
    ROTATE_HALF = 0
    INTERLEAVED = 1


class GluKind(IntEnum):
    GLU_SILU = 0
    GLU_GELU = 1
    GLU_GELU_TANH = 2
    GLU_COUNT = 3


class BinaryKind(IntEnum):
    BINARY_ADD = 0
    BINARY_SUB = 1
    BINARY_MUL = 2
    BINARY_DIV = 3
    BINARY_MAX = 4
    BINARY_MIN = 5
    BINARY_COUNT = 6


class UnaryKind(IntEnum):
    UNARY_COPY = 0
    UNARY_NEG = 1
    UNARY_EXP = 2
    UNARY_RSQRT = 3
    UNARY_SQRT = 4
    UNARY_SIGMOID = 5
    UNARY_SILU = 6
    UNARY_GELU = 7
    UNARY_GELU_TANH = 8
    UNARY_TANH = 9
    UNARY_RELU = 10
    UNARY_COS = 11
    UNARY_SIN = 12
    UNARY_RECIPROCAL = 13
    UNARY_SQUARE = 14
    UNARY_COUNT = 15


class Operand(ctypes.Structure):
    """A view's place: `bases[base] + offset + offset_per_token * tokens` (bytes); -1: absent."""

    _fields_ = (
        ("base", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("offset", ctypes.c_int64),
        ("offset_per_token", ctypes.c_int64),
    )


class Dim(ctypes.Structure):
    """An extent: `mult * syms[sym]`."""

    _fields_ = (("mult", ctypes.c_int64), ("sym", ctypes.c_int64))


class Instr(ctypes.Structure):
    """One kernel call. A zeroed Instr has operands that are present: set `base = -1` for absent
    ones (`absent_operands` does it for all of them)."""

    _fields_ = (
        ("op", ctypes.c_int32),
        ("barrier", ctypes.c_int32),
        ("operands", Operand * MAX_OPERANDS),
        ("dims", Dim * MAX_DIMS),
        ("strides", (ctypes.c_int64 * MAX_DIMS) * MAX_OPERANDS),
        ("attrs_i", ctypes.c_int64 * 12),
        ("attrs_f", ctypes.c_double * 4),
    )

    def absent_operands(self) -> None:
        """Mark every operand as absent."""
        for operand in self.operands:
            operand.base = -1


class NativeLibrary:
    """The shared library built by `graphopt.codegen.cpu.build.build_library`."""

    def __init__(self, path: Path) -> None:
        """Load `path`. Raises BackendError when it cannot be loaded or speaks another ABI."""
        try:
            library = ctypes.CDLL(str(path))
            version, size = library.go_abi_version, library.go_sizeof_instr
            run, check_step = library.go_run, library.go_check_step
        except (OSError, AttributeError) as error:
            raise BackendError(f"cannot load the native library {path}: {error}") from error
        version.restype = size.restype = run.restype = check_step.restype = ctypes.c_int64
        if (version(), size()) != (ABI_VERSION, ctypes.sizeof(Instr)):
            raise BackendError(
                f"native library {path} has ABI {version()} with {size()}-byte instructions; this "
                f"graphopt needs ABI {ABI_VERSION} with {ctypes.sizeof(Instr)}-byte instructions: "
                "delete the file, it is rebuilt at the next use"
            )
        run.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
        ]
        check_step.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        self.path = path
        self._run, self._check_step = run, check_step

    def check_step(
        self,
        inputs: Sequence[int],
        syms: ctypes.Array[ctypes.c_int64],
        block_size: int,
        blocks: int,
    ) -> None:
        """Raise BackendError naming the first step input that points outside the cache or the rows.

        inputs: addresses of slots, query_start, kv_lens, block_tables and logit_rows, all int64
        and as long as `syms` says. block_size, blocks: of the cache; 0 blocks: there is none.
        """
        addresses = (ctypes.c_void_p * len(inputs))(*inputs)
        status = self._check_step(addresses, syms, block_size, blocks)
        if status:
            name = ("slots", "query_start", "kv_lens", "block_tables", "logit_rows")[status - 1]
            raise BackendError(
                f"step input {name!r} points outside the {syms[Sym.SYM_TOKENS]} rows of this step "
                f"or the {blocks} blocks of {block_size} tokens of its cache"
            )

    def run(
        self,
        instrs: ctypes.Array[Instr],
        bases: ctypes.Array[ctypes.c_void_p],
        syms: ctypes.Array[ctypes.c_int64],
        threads: int,
    ) -> None:
        """Execute all of `instrs` on `threads` threads (1 to 1024) and return when done.

        `bases` are addresses that the operands index; `syms` has Sym.SYM_COUNT extents. Releases
        the interpreter lock; concurrent calls queue up. Kernels bound the rows that data names, and
        nothing else: the plan must be right (`bounds.py`). Raises BackendError naming the
        instruction that a kernel cannot execute, ScoreRangeError for scores outside the bounds of
        attention, CapacityError without memory for a kernel's scratch.
        """
        status = self._run(instrs, len(instrs), bases, syms, threads)
        if status == 0:
            return
        if status < 0:
            raise _no_run(status, syms, threads)
        number = instrs[status - 1].op
        name = Op(number).name if 0 <= number < Op.OP_COUNT else f"unknown op {number}"
        if number in (Op.OP_EMBED, Op.OP_GATHER_ROWS):
            raise BackendError(
                f"instruction {status - 1} ({name}) looks up a row that its table does not have: a "
                "token id or a position is out of range"
            )
        least_peak, most_peak = instrs[status - 1].attrs_f[2:4]
        if number == Op.OP_PAGED_ATTENTION and least_peak < most_peak:
            raise ScoreRangeError(paged_attention.peak_error(least_peak, most_peak))
        raise BackendError(
            f"instruction {status - 1} ({name}) has a dtype or attribute its kernel does not take"
        )


def _no_run(status: int, syms: ctypes.Array[ctypes.c_int64], threads: int) -> Exception:
    if status == NO_MEMORY:
        return no_memory(syms[Sym.SYM_TOKENS])
    if status == NO_THREAD:
        return BackendError(
            f"the system starts no {threads} threads for the kernels; compile with fewer threads"
        )
    return BackendError(f"thread count must be 1 to 1024, got {threads}")


def no_memory(rows: int) -> CapacityError:
    """What a step is told whose buffers do not fit into memory."""
    return CapacityError(
        f"there is not enough memory to compute {rows} token rows at once; use shorter inputs, or "
        "an engine with a smaller max_tokens_per_step"
    )
