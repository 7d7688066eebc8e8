"""The examples run as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("compile_a_module", "largest difference to the model"),
        ("write_a_pass", "one double negation folded"),
        pytest.param("chat", "", marks=pytest.mark.real_model),
    ],
)
def test_example(name: str, expected: str, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert expected in done.stdout
