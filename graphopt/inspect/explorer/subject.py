"""Finds what an explorer page shows: the trace and the report of one compilation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from graphopt.errors import NoRecordError, UnsupportedError
from graphopt.files.paths import as_path
from graphopt.models import BUILTINS, load
from graphopt.program.compile import compile
from graphopt.program.manifest import read_manifest as read_program_manifest
from graphopt.program.program import Program
from graphopt.program.save import TRACE, is_program, load_report
from graphopt.record.dump import is_dump, read_dump, read_manifest
from graphopt.record.report import Report
from graphopt.record.trace import Trace, read_trace

_DEFAULT = "cpu"
"""The backend of `compile` when none is named."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One compilation. name: of the model. backend: whose kernels are shown."""

    name: str
    trace: Trace
    report: Report
    backend: str


def subject_of(given: Program | str | Path) -> Subject:
    """A program; the folder of a saved program or of a dump (no weights are read); or a model as
    `graphopt.models.load` takes it, which is compiled for the reference backend.

    Raises NoRecordError for a program that was saved without its trace and for a dump that leaves
    graphs out, UnsupportedError for other subjects, and what loading and compiling raise.
    """
    if isinstance(given, Program):
        found = Subject(given.options.name, given.trace, given.report, given.options.backend)
    elif not isinstance(given, (str, Path)):
        raise UnsupportedError(
            "explore takes a Program, a folder or the name of a model, not a "
            f"{type(given).__name__}"
        )
    elif is_dump(as_path(given, UnsupportedError)):
        found = _dumped(Path(given))
        changed = [record for record in found.report.passes if record.has_changes]
        if found.trace.steps and len(found.trace.steps) < 1 + len(changed):
            raise NoRecordError(
                f"{given} leaves passes out (a filter, or a removed file): dump it whole"
            )
    elif is_program(Path(given)):
        folder = Path(given)
        options = read_program_manifest(folder).options
        trace, report = read_trace(folder / TRACE), load_report(folder)
        found = Subject(options.name, trace, report, options.backend)
    else:
        # Compiled for the backend that needs no kernels, shown as `compile` would run it.
        found = replace(subject_of(_compiled(str(given))), backend=_DEFAULT)
    if not found.trace.steps or not found.report.passes:
        raise NoRecordError(
            f"{given if isinstance(given, (str, Path)) else found.name} holds no trace of its "
            "passes: it was saved before programs kept theirs, or it is a dump with filters; "
            "compile it again"
        )
    return found


def _dumped(folder: Path) -> Subject:
    manifest = read_manifest(folder)
    name, backend = manifest.get("name", folder), manifest.get("backend", _DEFAULT)
    return Subject(str(name), *read_dump(folder), str(backend))


def _compiled(model: str) -> Program:
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise UnsupportedError(
            f"{model} is neither a saved program, nor a dump, nor a model: it has no manifest.json "
            "and no config.json"
        )
    is_packed = model in BUILTINS or model.endswith(".gguf")
    return compile(load(model, weights="packed" if is_packed else "dense"), backend="reference")
