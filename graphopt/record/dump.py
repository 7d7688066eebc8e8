"""A folder in which to read what a compilation did.

    00_capture.gir             the captured graph
    09_fuse_norm.gir           the graph after each pass that changed it
    diffs/09_fuse_norm.diff    what the pass changed, identical layers once ("x30")
    kernels/serving.txt        what runs each value of the serving graph
    summary.txt                a line a pass: ms, sites, nodes, ops, numeric error
    report.json.gz             every candidate of every pass; `graphopt explain DIR` reads it
    manifest.json              the files above with their sha256, the filters, a failure

Files are written as the passes run, so a pass that fails leaves everything up to it, and
`NN_pass.failed.gir`. A folder may be dumped into again: files of the earlier dump go, if they are
as they were written; nothing else is ever removed or overwritten.
"""

from __future__ import annotations

import contextlib
import fnmatch
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from graphopt import __version__
from graphopt.errors import (
    GraphoptError,
    NoRecordError,
    PassError,
    ProgramFormatError,
    UnsupportedError,
)
from graphopt.files.json_file import MOST_BYTES, parse_json, read_object
from graphopt.files.paths import Written, as_path
from graphopt.files.regular_file import check_regular
from graphopt.ir.graph import Graph
from graphopt.ir.text.printer import print_graph
from graphopt.record.calls import KernelCall
from graphopt.record.diff import collapsed_diff, read_line
from graphopt.record.report import LOGGER, Report
from graphopt.record.trace import CAPTURE, Trace, TraceStep, read_trace

FORMAT, KIND = 1, "dump"
MANIFEST, REPORT, SUMMARY = "manifest.json", "report.json.gz", "summary.txt"
_NOT_DUMPED = "not dumped"
_DAMAGE = (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError)
_OURS = re.compile(
    r"\d{2,}_\w+(\.part|\.failed)?\.gir|diffs/\d{2,}_\w+\.diff|kernels/\w+\.txt"
    r"|manifest\.json|report\.json\.gz|summary\.txt"
)


@dataclass(frozen=True, slots=True)
class Dump:
    """Where to dump, and what of it.

    passes: exact names; only these are written. layers: patterns of module paths
    ("model.layers.0*"); ops: patterns of ops ("graphopt.*"). With layers or ops the graph files
    hold the matching lines only, are called `.part.gir`, and cannot be read back.
    """

    folder: Path
    passes: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Paths may be given as text. Raises UnsupportedError for anything else than described."""
        object.__setattr__(self, "folder", as_path(self.folder, UnsupportedError))
        for option in ("passes", "layers", "ops"):
            given = getattr(self, option)
            is_list = isinstance(given, (tuple, list)) and all(isinstance(x, str) for x in given)
            if not is_list:
                raise UnsupportedError(f"Dump({option}={given!r}) must be a tuple of names")
            object.__setattr__(self, option, tuple(given))

    @property
    def is_partial(self) -> bool:
        """True when graph files leave lines out."""
        return bool(self.layers or self.ops)

    def shows(self, text: str) -> bool:
        """Whether a line of a graph text passes the filters."""
        line = read_line(text)
        return _matches(line.layer, self.layers) and _matches(line.op, self.ops)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(
        fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") for pattern in patterns
    )


def as_dump(value: Any, passes: Iterable[str]) -> Dump | None:
    """`compile(dump=)` as a Dump. Raises UnsupportedError for anything else than a path or a Dump,
    PassError for a filter that names no pass of the run."""
    if value is None:
        return None
    if not isinstance(value, Dump):
        try:
            return Dump(value)
        except UnsupportedError:
            raise UnsupportedError(
                f"dump={value!r} is not supported; supported: a folder, a Dump"
            ) from None
    known = [CAPTURE, *passes]
    for name in value.passes:
        if name not in known:
            raise PassError(f"dump names the pass {name!r}; passes of this run: {', '.join(known)}")
    return value


class DumpWriter:
    """Writes one dump. Raises UnsupportedError, before anything is changed, for a folder that
    holds files of these names which are not of an earlier dump, or no longer as it wrote them."""

    def __init__(self, dump: Dump) -> None:
        self.dump = dump
        self._written: dict[str, str] = {}
        self._files = Written(dump.folder)
        self._is_broken = False
        self._graphs: dict[int, str] = {}
        try:
            self._earlier = self._find_earlier()
        except (OSError, ValueError) as error:
            raise UnsupportedError(f"dump={str(dump.folder)!r} cannot be used: {error}") from None

    def _find_earlier(self) -> list[Path]:
        """The files of an earlier dump, after nothing was found that is in the way."""
        folder = self.dump.folder
        if folder.exists() and not folder.is_dir():
            raise UnsupportedError(f"dump={str(folder)!r} is a file; give a folder")
        listed = read_manifest(folder)["files"] if is_dump(folder) else {}
        earlier = []
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder).as_posix()
            if path.is_dir():
                if _OURS.fullmatch(inside):
                    raise UnsupportedError(f"{path} is in the way; dump into another folder")
                continue
            if inside in ("diffs", "kernels"):
                raise UnsupportedError(f"{path} is in the way; dump into another folder")
            if not _OURS.fullmatch(inside):
                continue
            check_regular(path, UnsupportedError)
            is_ours = listed.get(inside) == _sha256(path.read_bytes())
            if not is_ours and not (listed and inside == MANIFEST):
                what = "was changed since it was dumped" if inside in listed else "is in the way"
                raise UnsupportedError(f"{path} {what}; move it, or dump into another folder")
            earlier.append(path)
        self._files.make(folder)
        return earlier

    def step(self, step: TraceStep, previous: TraceStep | None) -> None:
        """Write the graph after a pass, and what the pass changed."""
        if self.dump.passes and step.name not in self.dump.passes:
            self._graphs[step.number] = _NOT_DUMPED
            return
        self._graphs[step.number] = self._graph(step.file, step.text)
        if previous is None:
            return
        shows = self.dump.shows if self.dump.is_partial else None
        diff = collapsed_diff(previous.text, step.text, previous.file, step.file, shows)
        self._write(f"diffs/{step.file.removesuffix('.gir')}.diff", diff)

    def _graph(self, file: str, text: str) -> str:
        """Returns the name of the file."""
        if self.dump.is_partial:
            shown = [line for line in text.splitlines() if self.dump.shows(line)]
            text, file = "\n".join([*shown, ""]), file.replace(".gir", ".part.gir")
        self._write(file, text)
        return file

    def finish(
        self,
        name: str,
        report: Report,
        trace: Trace,
        kernels: Sequence[KernelCall],
        backend: str,
        failure: str = "",
    ) -> None:
        """Write the summary, the kernels, the report and the manifest. name: of the model; backend:
        that it was compiled for."""
        unmatched = self._unmatched(trace)
        for text in unmatched:
            LOGGER.warning(text)
        self._write(SUMMARY, summary(name, report, self._graphs, failure, unmatched))
        if kernels:
            self._write("kernels/serving.txt", _kernel_list(kernels, trace.steps[-1].text))
        data = json.dumps({**report.to_dict(), "seconds": report.seconds, "notes": report.notes})
        self._write_bytes(REPORT, gzip.compress(data.encode(), mtime=0))
        manifest = {
            "format": FORMAT,
            "graphopt": __version__,
            "torch": torch.__version__,
            "kind": KIND,
            "name": name,
            "backend": backend,
            "filters": {k: getattr(self.dump, k) for k in ("passes", "layers", "ops")},
            "failure": failure,
            "files": self._written,
        }
        self._write_file(MANIFEST, json.dumps(manifest, indent=1).encode())

    def _unmatched(self, trace: Trace) -> list[str]:
        """A note for each filter of lines that matches none of the graphs that were written."""
        if not self.dump.is_partial:
            return []
        texts = [s.text for s in trace.steps if self._graphs.get(s.number) != _NOT_DUMPED]
        lines = [read_line(line) for text in texts for line in text.splitlines()]
        names = {"layers": {line.layer for line in lines}, "ops": {line.op for line in lines}}
        return [
            f"dump: no line of these graphs matches {option}={pattern!r}"
            for option, found in names.items()
            for pattern in getattr(self.dump, option)
            if not any(_matches(name, [pattern]) for name in found)
        ]

    def failed(
        self,
        graph: Graph,
        report: Report,
        trace: Trace,
        running: str,
        backend: str,
        error: Exception,
    ) -> None:
        """Write what there is: the graph as the failing pass left it, and the rest of the dump.

        running: name of the pass, "" when it was none. Nothing where it was the dump that failed.
        """
        if self._is_broken:
            return
        if running:
            # A broken graph may be too broken to print.
            with contextlib.suppress(GraphoptError, KeyError, AttributeError):
                file = f"{len(report.passes) + 1:02d}_{running}.failed.gir"
                self._write(file, print_graph(graph))
        text = f"{type(error).__name__}: {error}"
        failure = f"{running}: {text}" if running else text
        self.finish(graph.name, report, trace, (), backend, failure)

    def _write(self, file: str, text: str) -> None:
        self._write_bytes(file, text.encode())

    def _write_bytes(self, file: str, data: bytes) -> None:
        # Not before there is something to put in its place: capture may fail.
        for path in self._earlier:
            path.unlink(missing_ok=True)
        self._earlier.clear()
        self._write_file(file, data)
        self._written[file] = _sha256(data)

    def _write_file(self, file: str, data: bytes) -> None:
        try:
            self._files.write(file, data)
        except OSError as error:
            self._is_broken = True
            self._files.undo()
            raise UnsupportedError(
                f"dump={str(self.dump.folder)!r} could not be written, and nothing of it is left: "
                f"{error}"
            ) from error


def write_dump(
    to: str | Path | Dump,
    name: str,
    report: Report,
    trace: Trace,
    kernels: Sequence[KernelCall],
    backend: str,
) -> None:
    """A dump of a compilation that is over; see `Program.dump`. name: of the model."""
    if not trace.steps:
        raise NoRecordError(f"{name} was saved before programs kept their trace: compile it again")
    dump = as_dump(to, [record.name for record in report.passes])
    if dump is None:
        raise UnsupportedError("give the folder to dump to")
    writer = DumpWriter(dump)
    for previous, step in zip((None, *trace.steps), trace.steps, strict=False):
        writer.step(step, previous)
    writer.finish(name, report, trace, kernels, backend)


def summary(
    name: str,
    report: Report,
    files: dict[int, str],
    failure: str = "",
    notes: Sequence[str] = (),
) -> str:
    """What happened, a line a pass, as text.

    files: number of a pass in the report -> its graph file; a pass without one changed nothing.
    notes: beside those of the report.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    headings = ("pass", "ms", "verify ms", "sites", "rejected", "nodes", "numeric error")
    for heading in (*headings, "file", "ops"):
        is_text = heading in ("pass", "ops", "file")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=True)
    errors = {change.pass_name: f"{change.max_relative:.1e}" for change in report.numerics}
    for number, record in enumerate(report.passes, start=1):
        delta = record.nodes_after - record.nodes_before
        table.add_row(
            record.name,
            f"{record.milliseconds:.1f}",
            f"{record.verify_milliseconds:.1f}",
            str(len(record.sites)),
            str(len(record.rejections)),
            f"{record.nodes_after} ({delta:+d})" if delta else str(record.nodes_after),
            errors.get(record.name, "-"),
            files.get(number, "unchanged"),
            _largest(record.op_delta),
        )
    out = StringIO()
    Console(file=out, width=240, color_system=None, legacy_windows=False).print(table)
    rows = [line.rstrip() for line in out.getvalue().splitlines()]
    lines = [name, "", *(row for row in rows if row), ""]
    lines += [f"{stage}: {seconds:.2f} s" for stage, seconds in report.seconds.items()]
    lines += [f"note: {note}" for note in (*report.notes, *notes)]
    lines += [f"FAILED: {failure}"] if failure else []
    return "\n".join([*lines, ""])


def _largest(delta: dict[str, int]) -> str:
    """The three largest changes: `-61 aten.pow.Tensor_Scalar, +61 graphopt.rms_norm`."""
    changes = sorted(delta.items(), key=lambda item: -abs(item[1]))
    shown = ", ".join(f"{count:+d} {op}" for op, count in changes[:3])
    return shown + (f", {len(changes) - 3} more" if len(changes) > 3 else "")


def _kernel_list(kernels: Sequence[KernelCall], text: str) -> str:
    """value, where it runs, kernel, layer."""
    layers = {line.key: line.layer for line in map(read_line, text.splitlines())}
    rows = [("value", "runs in", "kernel", "layer")]
    for call in kernels:
        place = "native" if call.is_native else "torch"
        rows.append((call.value, place, call.kernel, layers.get(call.value, "")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join([*(line.rstrip() for line in padded), ""])


def is_dump(folder: Path) -> bool:
    """True for a folder that a dump was written to."""
    try:
        return bool(read_manifest(folder).get("kind") == KIND)
    except ProgramFormatError:
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a dump. Raises ProgramFormatError when it is none."""
    path = folder / MANIFEST
    data = read_object(path, ProgramFormatError)
    if not isinstance(data.get("files"), dict):
        raise ProgramFormatError(f"{path} is the manifest of no dump")
    return data


def read_dump(folder: str | Path) -> tuple[Trace, Report]:
    """What a dump holds, for the explorer and `explain`. Raises ProgramFormatError."""
    path = as_path(folder, ProgramFormatError)
    if not is_dump(path):
        raise ProgramFormatError(f"{path} is no dump: it has no {MANIFEST} of one")
    manifest = read_manifest(path)
    if manifest.get("format") != FORMAT:
        raise ProgramFormatError(
            f"{path} has format {manifest.get('format')!r}, this graphopt reads {FORMAT}"
        )
    check_regular(path / REPORT, ProgramFormatError)
    try:
        with gzip.open(path / REPORT) as file:
            # A small file can hold any number of bytes.
            text = file.read(MOST_BYTES)
        data = parse_json(text, str(path / REPORT), ProgramFormatError)
        report = Report.from_dict(data)
        report.seconds, report.notes = dict(data["seconds"]), list(data["notes"])
    except _DAMAGE as error:
        raise ProgramFormatError(f"{path / REPORT} is damaged: {error!r}") from error
    return read_trace(path), report


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
