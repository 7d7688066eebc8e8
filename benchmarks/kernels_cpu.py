"""Linear kernels of the cpu backend against torch, interleaved in one run; medians.

Small batches are measured as a decoder meets them: distinct weights, more than the caches hold, in
one plan, as the share of the read rate this machine reaches on a plain sum. Prefill is measured as
arithmetic rate, 2 * rows * N * K operations a product.

    python benchmarks/kernels_cpu.py [--threads 2] [--rounds 9]
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.codegen.cpu.abi import Dim, DType, Instr, Op, Operand, Sym
from graphopt.codegen.cpu.build import load_library
from graphopt.codegen.cpu.packing import KernelWeight, pack_dense, pack_low_bit
from graphopt.ir.weights import PackedWeight

FLOAT, INT8 = 0, 1
STREAMED_BYTES = 200e6
DECODE_SHAPE = (1536, 576)
VOCABULARY_SHAPE = (49152, 576)
PREFILL_SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536), (1536, 1536)]
PREFILL_ROWS = 1024
DTYPES = {torch.float32: DType.F32, torch.bfloat16: DType.BF16}


def random_packed(n: int, k: int, bits: int, zero: bool) -> PackedWeight:
    """Random codes in groups of 32."""
    if bits == 4:
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    else:
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    scale = (torch.rand(n, k // 32) * 0.02 + 0.001).half()
    zeros = (torch.randn(n, k // 32) * 0.1).half() if zero else None
    return PackedWeight(bits, 32, codes, scale, zeros, 8 if bits == 4 and not zero else 0, "")


def plan(x: Tensor, weights: Sequence[KernelWeight], mode: int, threads: int) -> Callable[[], None]:
    """One native call that multiplies x by every weight."""
    library, rows = load_library(), x.shape[0]
    out = torch.empty(rows, weights[0].n, dtype=x.dtype)
    instrs = (Instr * len(weights))()
    for i, (instr, weight) in enumerate(zip(instrs, weights, strict=True)):
        instr.op, instr.barrier = Op.OP_LINEAR, 1
        instr.absent_operands()
        for operand, (base, dtype) in enumerate(
            [(0, DTYPES[x.dtype]), (1, DTYPES[x.dtype]), (2 + i, DType.U8)]
        ):
            instr.operands[operand] = Operand(base, dtype, 0, 0)
        for j, extent in enumerate((rows, weight.n, weight.k)):
            instr.dims[j] = Dim(extent, Sym.SYM_ONE)
        instr.strides[0][0], instr.strides[1][0] = out.stride(0), x.stride(0)
        instr.attrs_i[0], instr.attrs_i[1], instr.attrs_i[4] = weight.kind, mode, weight.offset
    addresses = [out.data_ptr(), x.data_ptr(), *(weight.data.data_ptr() for weight in weights)]
    bases = (ctypes.c_void_p * len(addresses))(*addresses)
    syms = (ctypes.c_int64 * Sym.SYM_COUNT)(1)
    alive = (out, x, weights)

    def run() -> None:
        assert alive
        library.run(instrs, bases, syms, threads)

    return run


def interleaved(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each case; the cases take turns, so drift hits them alike.

    Each timed call follows an untimed one of the same case: torch's threads keep spinning on the
    cores for milliseconds after its operators, and would slow down whatever comes next.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            case()
            start = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def kernel_weights(n: int, k: int) -> dict[str, tuple[KernelWeight, int]]:
    """Every kind of weight with the activation mode it is measured in."""
    dense = torch.randn(n, k)
    q4, q4z = (
        pack_low_bit(random_packed(n, k, 4, False)),
        pack_low_bit(random_packed(n, k, 4, True)),
    )
    q8 = pack_low_bit(random_packed(n, k, 8, False))
    return {
        "f32": (pack_dense(dense), FLOAT),
        "bf16": (pack_dense(dense.bfloat16()), FLOAT),
        "q4 float": (q4, FLOAT),
        "q4 int8": (q4, INT8),
        "q4+zero float": (q4z, FLOAT),
        "q4+zero int8": (q4z, INT8),
        "q8 float": (q8, FLOAT),
        "q8 int8": (q8, INT8),
    }


def clones(weight: KernelWeight) -> list[KernelWeight]:
    """The weight and copies of it in other memory, STREAMED_BYTES in all."""
    count = max(1, round(STREAMED_BYTES / weight.nbytes))
    return [
        KernelWeight(
            weight.kind, weight.data.clone(), weight.n, weight.k, weight.group, weight.offset
        )
        for _ in range(count)
    ]


def read_rate(rounds: int) -> float:
    """Bytes a second of a plain sum."""
    words = torch.ones(int(STREAMED_BYTES) // 4)
    seconds = interleaved({"sum": words.sum}, rounds)["sum"]
    return words.numel() * 4 / seconds


def decode(n: int, k: int, rows_of: Sequence[int], threads: int, rounds: int) -> None:
    """Small batches: one kind at a time (each kind streams its own 200 MB)."""
    print(f"\nsmall batches, N={n} K={k}: GB/s of weights, share of the read rate; time over M=1")
    for name, (weight, mode) in kernel_weights(n, k).items():
        weights = clones(weight)
        size = sum(each.nbytes for each in weights)
        cases: dict[str, Callable[[], object]] = {
            str(rows): plan(torch.randn(rows, k), weights, mode, threads) for rows in rows_of
        }
        words = torch.ones(size // 4)
        cases["sum"] = words.sum
        seconds = interleaved(cases, rounds)
        rate, first = words.numel() * 4 / seconds.pop("sum"), seconds[str(rows_of[0])]
        columns = [
            f"M={rows}: {size / s / 1e9:5.1f} ({size / s / rate:4.0%}, {s / first:4.2f}x)"
            for rows, s in seconds.items()
        ]
        print(f"{name:14s} {'  '.join(columns)}")
    for dtype in DTYPES:
        dense = torch.randn(n, k, dtype=dtype)
        count = max(1, round(STREAMED_BYTES / dense.nbytes))
        several = [dense.clone() for _ in range(count)]

        def stream(x: Tensor, several: list[Tensor] = several) -> None:
            for weight in several:
                F.linear(x, weight)

        columns = []
        for rows in rows_of:
            x = torch.randn(rows, k, dtype=dtype)
            s = interleaved({"torch": lambda x=x: stream(x)}, rounds)["torch"]  # type: ignore[misc]
            columns.append(f"M={rows}: {dense.nbytes * count / s / 1e9:5.1f}")
        print(f"torch {str(dtype)[6:]:8s} {'  '.join(columns)}")


def prefill(rows: int, threads: int, rounds: int) -> None:
    """Many rows."""
    print(f"\nprefill, M={rows}: GFLOP/s")
    for n, k in PREFILL_SHAPES:
        x = torch.randn(rows, k)
        cases: dict[str, Callable[[], object]] = {
            name: plan(x, [weight], mode, threads)
            for name, (weight, mode) in kernel_weights(n, k).items()
        }
        dense = torch.randn(n, k)
        x16, dense16 = x.bfloat16(), dense.bfloat16()
        cases["bf16, bf16 x"] = plan(x16, [pack_dense(dense16)], FLOAT, threads)
        cases["torch fp32"] = lambda x=x, w=dense: F.linear(x, w)  # type: ignore[misc]
        cases["torch bf16"] = lambda x=x16, w=dense16: F.linear(x, w)  # type: ignore[misc]
        seconds = interleaved(cases, rounds)
        print(f"N={n} K={k}")
        for name, s in seconds.items():
            rate = 2 * rows * n * k / s / 1e9
            print(f"  {name:14s} {rate:7.1f}  ({s * 1e3:.2f} ms)")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=("decode", "prefill"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads, read rate {read_rate(arguments.rounds) / 1e9:.1f} GB/s")
    if arguments.only != "prefill":
        for n, k in (DECODE_SHAPE, VOCABULARY_SHAPE):
            decode(n, k, (1, 2, 4, 8, 16), arguments.threads, arguments.rounds)
    if arguments.only != "decode":
        prefill(PREFILL_ROWS, arguments.threads, arguments.rounds)


if __name__ == "__main__":
    main()
