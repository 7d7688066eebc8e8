"""The kernels under ASan, UBSan and TSan, each in a process of its own; see tools/sanitize.py.

The first run on a machine builds two more libraries into the cache folder.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.config import child_environment

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = 77
# What reads and writes by every kernel and dtype; `make sanitize` runs all of tests/codegen.
QUICK = (
    "tests/codegen/test_kernel_operands.py",
    "tests/codegen/test_cpu_kernels.py",
    "tests/codegen/test_cpu_linear.py::test_no_rows",
    "tests/codegen/test_cpu_attention.py",
)

pytestmark = pytest.mark.slow


def sanitize(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the tool; skips the test, with the compiler's reason, where it has no sanitizer."""
    done = subprocess.run(
        [sys.executable, "tools/sanitize.py", *arguments],
        cwd=ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == SKIPPED:
        pytest.skip(done.stdout.strip().splitlines()[0])
    return done


def test_kernels_are_clean_under_address_and_undefined_behaviour() -> None:
    options = ("-q", "--capture=sys", "-p", "no:faulthandler", "-p", "no:cacheprovider")
    done = sanitize("address", "-m", "pytest", *options, "-m", "not slow", *QUICK)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


def test_wrong_plans_are_reported() -> None:
    """That the kernels are clean means something: where they are not, it is seen."""
    done = sanitize("address", "tests/codegen/stress/wrong_access.py")
    said = done.stdout + done.stderr
    for name in ("block_table", "slot", "width", "alignment"):
        assert f"{name}: ended" in said, said
    assert said.count("AddressSanitizer: heap-buffer-overflow") >= 3
    assert "misaligned address" in said
    assert done.returncode not in (0, SKIPPED)


def test_the_executor_has_no_races_and_one_would_be_reported() -> None:
    done = sanitize("thread", "--callers", "4", "--rounds", "60", "--prove")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "4 callers x 60 rounds: 0 wrong" in done.stdout
    assert "ThreadSanitizer: data race" in done.stderr
    assert "without barriers the races are found" in done.stdout
