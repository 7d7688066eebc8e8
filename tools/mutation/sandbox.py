"""Processes that run tests: children of one that has imported what graphopt imports.

Importing torch takes longer than most tests, so a parent does it once and forks; nothing of
graphopt is imported before the fork. A child's output goes to a file, its result to another.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.mutation.sources import ROOT

MARKERS = "not real_model and not slow and not gpu"
_MEMORY = 24 << 30
_FOREIGN = """
import sys, pkgutil, importlib, graphopt
for part in ("", ".ir", ".ops", ".capture", ".passes", ".codegen", ".runtime", ".models"):
    package = importlib.import_module("graphopt" + part)
    for found in pkgutil.iter_modules(package.__path__, "graphopt" + part + "."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
import hypothesis, _pytest.assertion.rewrite, torch.export, torch._dynamo
print("\\n".join(m for m in sys.modules if not m.startswith(("graphopt", "__"))))
"""


def warm_up() -> None:
    """Import what graphopt and its tests import from elsewhere."""
    done = subprocess.run(
        [sys.executable, "-c", _FOREIGN], capture_output=True, text=True, check=True, cwd=ROOT
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in done.stdout.split():
            # Some names are made by other modules and cannot be imported on their own.
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    assert "graphopt" not in sys.modules


def run(work: Callable[[], Any], log: Path, seconds: float) -> Any:
    """What `work` returns in a child of its own, as JSON; a text when there is none: "time", or
    the signal that the child died of."""
    answer = log.with_suffix(".json")
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _child(work, log, answer)
    ends = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > ends:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "time"
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        # What it may have started itself.
        os.killpg(child, signal.SIGKILL)
    if answer.exists():
        return json.loads(answer.read_text())
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "no answer"


def _child(work: Callable[[], Any], log: Path, answer: Path) -> None:
    status = 1
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        os.chdir(ROOT)
        result = work()
        sys.stdout.flush()
        answer.write_text(json.dumps(result))
        status = 0
    finally:
        os._exit(status)


def pytest_arguments(paths: list[str], folder: Path) -> list[str]:
    """Of a run that writes into `folder` only."""
    options = ["-q", "-p", "no:cacheprovider", "--basetemp", str(folder), "-m", MARKERS]
    return [*options, "--no-header", "-W", "ignore", *paths]
