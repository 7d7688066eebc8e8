"""Without memory or threads a run ends with a typed error, and the next one is right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.config import child_environment

SCRIPT = """
import gc, resource, sys
sys.path.insert(0, sys.argv[1])
import torch
from native_plan import call, execute
from graphopt.codegen.cpu.abi import Op
from graphopt.codegen.cpu.packing import pack_dense
from graphopt.errors import BackendError, CapacityError

MIB = 1 << 20
unlimited = resource.getrlimit(resource.RLIMIT_AS)

def limit(more):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, unlimited[1]))

def refusal(run, more):
    limit(more)
    try:
        run()
    except (BackendError, CapacityError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
    return "nothing"

def linear(threads):
    out.fill_(float("nan"))
    attributes = [int(weight.kind), 0, 0, 0, 0]
    dims, strides = [rows, weight.n, weight.k], [[weight.n], [weight.k], []]
    call(Op.OP_LINEAR, [out, x, weight.data], dims, strides, attributes, threads=threads,
         SYM_TOKENS=rows)

def norm(threads):
    wide = x.view(1, -1)
    call(Op.OP_RMS_NORM, [wide, wide], [1, 1, wide.shape[1]], [[0, 0]] * 2, [0], [1e-5, 0.0],
         threads=threads, SYM_TOKENS=rows)

rows = 3000
weight = pack_dense(torch.randn(20, 8192).bfloat16())
x, out = torch.randn(rows, 8192).bfloat16(), torch.zeros(rows, 20)
execute([], [], 3)
call(Op.OP_UNARY, [out, out], [1, 1, 1, 60000], [[0, 0, 0, 1]] * 2, [0])
print(refusal(lambda: execute([], [], 900), 100 * MIB))
for threads in (1, 3):
    for kernel in (linear, norm):
        print(refusal(lambda: kernel(threads), 20 * MIB))
for threads in (1, 3, 4):
    linear(threads)
    expected = x[:5].float() @ weight.data.float().transpose(1, 2).reshape(-1, 8192)[:20].t()
    print((out[:5] - expected).abs().max().item() < 0.05, bool(out.isfinite().all()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space, /proc")
def test_runs_without_memory_or_threads() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(Path(__file__).parent)],
        env=child_environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    refused, *memory = done.stdout.splitlines()
    assert refused.startswith("BackendError: the system starts no 900 threads for the kernels")
    for line in memory[:4]:
        assert line.startswith("CapacityError: there is not enough memory to compute 3000 token")
    assert memory[4:] == ["True True"] * 3
