"""Built-in instruments: what can be put around a pass without the pass knowing.

Timing, verification and op-count deltas are part of every `PassRecord`; the instrument here writes
the graph text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphopt.errors import UnsupportedError
from graphopt.ir.graph import Graph
from graphopt.ir.printer import print_graph
from graphopt.passes.base import Pass
from graphopt.report import PassRecord


class DumpInstrument:
    """Writes `00_capture.gir`, then `NN_pass.gir` for each pass that changed the graph.

    The folder must be new, empty, or hold only earlier dumps; other files are never touched.
    """

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise UnsupportedError(f"dump={str(folder)!r} is a file; give a folder")
        self.folder = folder
        self._number = 0
        self._previous = ""

    def captured(self, graph: Graph) -> None:
        """The graph before the first pass."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write("capture", print_graph(graph))

    def before(self, pass_: Pass[Any], graph: Graph) -> None:
        """Nothing: the text after the previous pass is the text before this one."""

    def after(self, pass_: Pass[Any], graph: Graph, record: PassRecord) -> None:
        """Write the graph when its text changed."""
        self._number += 1
        text = print_graph(graph)
        if text != self._previous:
            self._write(record.name, text)

    def _write(self, name: str, text: str) -> None:
        (self.folder / f"{self._number:02d}_{name}.gir").write_text(text)
        self._previous = text
