"""What each file of the runtime may import."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import graphopt.runtime

FILES = sorted(Path(graphopt.runtime.__file__).parent.glob("*.py"))
WITH_TORCH = {"sampler.py", "runner.py", "logits_processors.py"}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_every_file_is_looked_at() -> None:
    assert {path.name for path in FILES} >= WITH_TORCH | {"engine.py", "scheduler.py", "blocks.py"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    if path.name not in WITH_TORCH:
        assert not roots & {"torch", "numpy"}
    ours = {name for name in imports(path) if name.startswith("graphopt")}
    allowed = ("graphopt.errors", "graphopt.runtime", "graphopt.codegen.backend")
    assert all(name.startswith(allowed) for name in ours)
    if path.name in {"scheduler.py", "blocks.py", "request.py"}:
        assert not roots & {"time", "random", "os", "threading"}
