"""`graphopt.bisect`: which rewrite made the model wrong.

The passes are run one after another on one captured graph. After each, the oracle judges the graph;
at the first bad one the pass is run again on the graph before it, with fewer rewrites, until the
first bad rewrite stands alone. The default oracle is numeric: the graph must compute what the
captured one did.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from graphopt.capture import ModelSource, capture
from graphopt.capture.arguments import Example
from graphopt.capture.capture import Dynamic
from graphopt.check.oracle import fitting, outputs_of, random_inputs, relative_error
from graphopt.errors import PassError, UnsupportedError
from graphopt.files.paths import as_path, whole_folder
from graphopt.ir.graph import Graph, namespaces_of
from graphopt.ir.text.printer import print_graph
from graphopt.models import load
from graphopt.passes.base import Pass, run_pass
from graphopt.passes.manager import PassManager
from graphopt.passes.recipe import plan_passes
from graphopt.passes.registry import ordered
from graphopt.record.diff import collapsed_diff
from graphopt.record.report import LIMIT, Rejection, Report, Site

Judge = Callable[[Graph], bool]
TOLERANCE = 1e-3
"""Largest relative error that counts as rounding; fp32 models stay far below, bf16 ones do not."""

_TOLERANCES = {torch.float64: TOLERANCE, torch.float32: TOLERANCE}
_COARSE = 5e-2


@dataclass(frozen=True, slots=True, eq=False)
class Bisection:
    """The first bad rewrite.

    site: where it is; None when the pass fails without any rewrite applied. error: relative error
    of the graph with it, and `error_before` without, None with an oracle of the caller's own.
    diff: what this one rewrite changed in the graph text. failure: text of the exception
    when the pass or the graph after it raised. tried: graphs judged.
    """

    pass_name: str
    site: Site | None
    error: float | None
    error_before: float | None
    diff: str
    failure: str
    tried: int
    seconds: float
    before: Graph
    after: Graph | None
    inputs: tuple[Tensor, ...]

    def __str__(self) -> str:
        name = self.site.name if self.site else self.pass_name
        place = ""
        if self.site:
            place = (
                f" in {self.site.layer or 'the model'} at {self.site.source or 'no source line'}"
            )
        lines = [f"first bad rewrite: {name}{place}"]
        if self.error is not None and self.error_before is not None:
            lines.append(f"relative error {self.error_before:.2e} -> {self.error:.2e}")
        if self.failure:
            lines.append(f"it raised {self.failure}")
        lines.append(f"{self.tried} graphs judged in {self.seconds:.1f} s")
        return "\n".join([*lines, "", self.diff.rstrip()])

    def save(self, folder: str | Path) -> None:
        """Write a reproducer that runs alone: graph text before and after, weights, inputs, and
        `reproduce.py`. Raises UnsupportedError for a folder that is neither new nor empty, or that
        cannot be written: then nothing is left."""
        path = as_path(folder, UnsupportedError)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UnsupportedError(f"{path} exists and is not an empty folder")
        with whole_folder(path, lambda error: UnsupportedError(f"{path} not written: {error}")):
            self._write(path)

    def _write(self, path: Path) -> None:
        (path / "before.gir").write_text(print_graph(self.before))
        weights = {**self.before.weights}
        if self.after is not None:
            (path / "after.gir").write_text(print_graph(self.after))
            weights |= self.after.weights
        (path / "rewrite.diff").write_text(self.diff)
        save_file(
            {n: t.clone().contiguous() for n, t in weights.items()}, path / "weights.safetensors"
        )
        inputs = {f"{i:02d}": t.clone().contiguous() for i, t in enumerate(self.inputs)}
        save_file(inputs, path / "inputs.safetensors")
        known = namespaces_of(self.before) | namespaces_of(self.after or self.before)
        template = _RAISING if self.after is None else _REPRODUCER
        script = template.replace("NAMESPACES", repr(sorted(known)))
        script = script.replace("PASS", repr(self.pass_name))
        (path / "reproduce.py").write_text(script)


_REPRODUCER = '''"""Runs the graph before and after one rewrite; prints how far apart they are."""

from pathlib import Path

from safetensors.torch import load_file

from graphopt.ir.text.parser import parse_graph
from graphopt.check.oracle import outputs_of, relative_error

folder = Path(__file__).parent
weights = load_file(folder / "weights.safetensors")
inputs = [tensor for _, tensor in sorted(load_file(folder / "inputs.safetensors").items())]
# Ops of a library of your own: import it above.
graphs = [
    parse_graph((folder / f"{name}.gir").read_text(), weights, namespaces=NAMESPACES)
    for name in ("before", "after")
]
before = outputs_of(graphs[0], inputs)
after = outputs_of(graphs[1], inputs, like=before)
print((folder / "rewrite.diff").read_text())
print(f"relative error of this rewrite: {relative_error(after, before):.3e}")
'''


_RAISING = '''"""Runs the pass that raised, on the graph before it."""

from pathlib import Path

from safetensors.torch import load_file

from graphopt.ir.text.parser import parse_graph
from graphopt.passes.manager import PassManager
from graphopt.record.report import Report

# A pass or ops of your own: import them here.
folder = Path(__file__).parent
weights = load_file(folder / "weights.safetensors")
before = parse_graph((folder / "before.gir").read_text(), weights, namespaces=NAMESPACES)
PassManager([PASS]).run(before, Report())
print("the pass raised nothing")
'''


def bisect(
    model: nn.Module | ModelSource | ExportedProgram | Graph | str,
    example: Example | None = None,
    *,
    is_good: Judge | None = None,
    inputs: Sequence[Tensor] | None = None,
    tolerance: float | None = None,
    dynamic: Dynamic | bool = True,
    passes: Sequence[str] | None = None,
    enable: Sequence[str] = (),
    disable: Sequence[str] = (),
    limits: Mapping[str, int] | None = None,
    serving: bool = True,
) -> Bisection | None:
    """The first rewrite that makes the model wrong, None when there is none.

    model, example, dynamic, passes, enable, disable, limits: as for `graphopt.compile`.
    is_good: judges a graph (captured or serving form) instead of the numeric oracle; an exception
        of it counts as bad.
    inputs: of the captured graph, for the numeric oracle; random ones by default.
    tolerance: largest relative error that counts as rounding (default: 1e-3, 5e-2 below float32).
    serving: judge the passes of the cache stage, too.
    Raises UnsupportedError for weights without data (a GGUF file with packed weights: load it with
    weights="dense"), and PassError when the captured graph itself is bad.
    """
    start = time.perf_counter()
    plan = plan_passes(passes, enable, disable, limits, "float", "auto" if serving else "off")
    source = load(model) if isinstance(model, str) else model
    graph = (
        source.copy() if isinstance(source, Graph) else capture(source, example, dynamic=dynamic)
    )
    if graph.packed:
        raise UnsupportedError(
            "bisect runs the captured graph, and its low-bit weights have no data yet; load the "
            "model with weights='dense'"
        )
    search = _Search(graph, is_good, inputs, tolerance)
    for cls in ordered(plan.running):
        after = graph.copy()
        limit = plan.limits.get(cls.name)
        failure = search.run(cls, after, limit)
        if not failure and search.good(after):
            graph = after
            continue
        return search.site(cls, graph, start, limit)
    return None


def locate(
    cls: type[Pass[Any]], before: Graph, inputs: Sequence[Tensor], tolerance: float
) -> Site | None:
    """The first rewrite of a pass that changes what `before` computes by more than `tolerance`."""
    search = _Search(before, None, inputs, tolerance)
    return search.site(cls, before, time.perf_counter()).site


class _Search:
    """The oracle, with what it has seen."""

    def __init__(
        self,
        graph: Graph,
        is_good: Judge | None,
        inputs: Sequence[Tensor] | None,
        tolerance: float | None,
    ) -> None:
        if tolerance is not None and not 0 <= tolerance < math.inf:
            raise UnsupportedError(f"tolerance={tolerance!r} must be a number >= 0")
        if is_good is not None and not callable(is_good):
            raise UnsupportedError(f"is_good={is_good!r} must be a function of a graph")
        self.inputs = random_inputs(graph) if inputs is None else fitting(graph, inputs)
        self.is_good = is_good
        self.tried = 0
        self.failure = ""
        self.measured: float | None = None
        self.expected: tuple[Tensor, ...] = ()
        if is_good is None:
            self.expected = outputs_of(graph, self.inputs)
        coarse = any(o.dtype not in _TOLERANCES for o in self.expected if o.is_floating_point())
        self.tolerance = (_COARSE if coarse else TOLERANCE) if tolerance is None else tolerance
        if is_good is not None and not self.good(graph):
            raise PassError("the captured graph is bad already, before any pass")

    def error(self, graph: Graph) -> float | None:
        """Relative error, None with an oracle of the caller's own."""
        if self.is_good is not None:
            return None
        return relative_error(outputs_of(graph, self.inputs, self.expected), self.expected)

    def good(self, graph: Graph) -> bool:
        """The verdict; an exception is a bad one."""
        self.tried += 1
        try:
            if self.is_good is not None:
                return bool(self.is_good(graph))
            self.measured = self.error(graph)
            return self.measured is not None and self.measured <= self.tolerance
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            return False

    def run(
        self, cls: type[Pass[Any]], graph: Graph, limit: int | None, report: Report | None = None
    ) -> str:
        """Run one pass in place; the text of what it raised."""
        try:
            limits = {} if limit is None else {cls.name: limit}
            PassManager([cls.name], limits=limits).run(graph, report or Report())
        # Whatever a pass raises is the finding.
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            return self.failure
        return ""

    def _bad_with(self, cls: type[Pass[Any]], before: Graph, limit: int) -> bool:
        graph = before.copy()
        return bool(self.run(cls, graph, limit)) or not self.good(graph)

    def site(
        self, cls: type[Pass[Any]], before: Graph, start: float, limit: int | None = None
    ) -> Bisection:
        """The first bad rewrite of a pass that is known to be bad.

        limit: highest number of rewrites that it may apply.
        """
        known_bad = len(list(cls().match(before)))
        known_bad = known_bad if limit is None else min(known_bad, limit)
        good = 0
        if cls.required or known_bad == 0 or self._bad_with(cls, before, 0):
            return self._found(cls, before, None, None, start)
        while known_bad - good > 1:
            middle = (good + known_bad) // 2
            if self._bad_with(cls, before, middle):
                known_bad = middle
            else:
                good = middle
        return self._found(cls, before, good, known_bad, start)

    def _next_site(self, cls: type[Pass[Any]], before: Graph, good: int | None) -> Site | None:
        """The rewrite after `good` ones, of a pass that was seen to get so far and no further."""
        if good is None:
            return None
        for candidate in run_pass(cls(), before.copy(), good):
            if isinstance(candidate.result, Rejection) and candidate.result.code == LIMIT:
                return Site(f"{cls.name}#{good}", candidate.layer, candidate.source)
        return None

    def _found(
        self,
        cls: type[Pass[Any]],
        before: Graph,
        good: int | None,
        bad: int | None,
        start: float,
    ) -> Bisection:
        last_good, first_bad = before.copy(), before.copy()
        if good is not None:
            self.run(cls, last_good, good)
        self.failure = ""
        self.measured, report = None, Report()
        is_whole = not self.run(cls, first_bad, bad, report)
        if is_whole:
            self.good(first_bad)
        error = self.measured
        sites = report.passes[-1].sites if report.passes else ()
        diff = collapsed_diff(print_graph(last_good), print_graph(first_bad)) if is_whole else ""
        return Bisection(
            cls.name,
            sites[-1] if sites and bad is not None else self._next_site(cls, before, good),
            error,
            None if self.failure else self.error(last_good),
            diff,
            self.failure,
            self.tried,
            time.perf_counter() - start,
            last_good,
            first_bad if is_whole else None,
            self.inputs,
        )
