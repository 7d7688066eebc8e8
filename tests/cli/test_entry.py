"""The `graphopt` command before its command line is there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.config import child_environment

ENTRY = Path(__file__).parents[2] / "graphopt" / "cli" / "entry.py"
# Stands for a package that is interrupted while it imports, in the middle of something that
# reports whatever it is given.
SLOW_PACKAGE = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(10_000_000):
        pass
except BaseException as error:
    raise ImportError("half imported") from error
"""
READY_PACKAGE = """
import os, signal
def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10_000_000):
            pass
    except KeyboardInterrupt:
        print("told")
"""

# Whoever starts the tests may have interrupts ignored.
DEFAULT = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"


def run(folder: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    script = f"{before}; from graphopt.cli import entry; entry.main()".lstrip("; ")
    return subprocess.run(
        [sys.executable, "-S", "-c", script],
        env=child_environment(PYTHONPATH=str(folder)),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def package(folder: Path, cli: str) -> Path:
    inside = folder / "graphopt" / "cli"
    inside.mkdir(parents=True)
    for path in (inside.parent, inside):
        (path / "__init__.py").write_text("")
    shutil.copy(ENTRY, inside)
    (inside / "app.py").write_text(cli)
    return folder


def test_an_interrupt_while_it_imports_ends_it_quietly(tmp_path: Path) -> None:
    done = run(package(tmp_path, SLOW_PACKAGE), DEFAULT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_an_interrupt_later_is_the_command_lines_matter(tmp_path: Path) -> None:
    done = run(package(tmp_path, READY_PACKAGE), DEFAULT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "told\n", "")


@pytest.mark.parametrize("cli", [READY_PACKAGE, SLOW_PACKAGE + "\ndef main(): pass"])
def test_where_interrupts_are_ignored_they_stay_ignored(tmp_path: Path, cli: str) -> None:
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    done = run(package(tmp_path, cli), ignored)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
