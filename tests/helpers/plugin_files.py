"""Distributions with entry points, written for one test and found by importlib.metadata."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from graphopt import plugins
from graphopt.passes import registry

PASS = """
import graphopt
from graphopt.passes.base import Pass

@graphopt.register_pass
class Found(Pass):
    name, stage = {name!r}, {stage!r}
    after, before, requires = {after!r}, {before!r}, {requires!r}

    def match(self, graph):
        return []

    def check(self, graph, node):
        raise AssertionError

    def rewrite(self, builder, bound):
        raise AssertionError
"""


def pass_code(
    name: str,
    stage: str = "fuse",
    *,
    after: tuple[str, ...] = (),
    before: tuple[str, ...] = (),
    requires: tuple[str, ...] = (),
) -> str:
    """A module that registers one pass without candidates."""
    return PASS.format(name=name, stage=stage, after=after, before=before, requires=requires)


def write_plugin(
    folder: Path, distribution: str, module: str, code: str, group: str, value: str = ""
) -> None:
    """A module and the metadata of a distribution whose one entry point names it."""
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nthing = {value or module}\n")


@contextmanager
def installed(folder: Path) -> Iterator[None]:
    """The distributions of a folder are found inside; they and their passes are forgotten after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_REGISTRY", registry.all_passes())
        patch.syspath_prepend(folder)
        forget()
        try:
            yield
        finally:
            patch.undo()
            forget()
            for path in folder.glob("*.py"):
                sys.modules.pop(path.stem, None)


def forget() -> None:
    """Look for entry points anew."""
    plugins.load.cache_clear()
    plugins._entries.cache_clear()
