"""Finds what an explorer page shows: the trace and the report of one compilation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from graphopt.compiler import compile
from graphopt.dump import is_dump, read_dump, read_manifest
from graphopt.errors import NoRecordError, UnsupportedError
from graphopt.manifest import read_manifest as read_program_manifest
from graphopt.models import BUILTINS, load
from graphopt.paths import as_path
from graphopt.program import Program
from graphopt.report import Report
from graphopt.storage import TRACE, is_program, load_report
from graphopt.trace import Trace, read_trace


@dataclass(frozen=True, slots=True)
class Subject:
    """One compilation. name: of the model."""

    name: str
    trace: Trace
    report: Report


def subject_of(given: Program | str | Path) -> Subject:
    """A program; the folder of a saved program or of a dump (no weights are read); or a model as
    `graphopt.models.load` takes it, which is compiled for the reference backend.

    Raises NoRecordError for a program that was saved without its trace and for a dump that leaves
    graphs out, UnsupportedError for other subjects, and what loading and compiling raise.
    """
    if isinstance(given, Program):
        found = Subject(given.options.name, given.trace, given.report)
    elif not isinstance(given, (str, Path)):
        raise UnsupportedError(
            "explore takes a Program, a folder or the name of a model, not a "
            f"{type(given).__name__}"
        )
    elif is_dump(as_path(given, UnsupportedError)):
        found = Subject(str(read_manifest(Path(given)).get("name", given)), *read_dump(given))
        changed = [record for record in found.report.passes if record.has_changes]
        if found.trace.steps and len(found.trace.steps) < 1 + len(changed):
            raise NoRecordError(
                f"{given} leaves passes out (a filter, or a removed file): dump it whole"
            )
    elif is_program(Path(given)):
        folder = Path(given)
        name = read_program_manifest(folder).options.name
        found = Subject(name, read_trace(folder / TRACE), load_report(folder))
    else:
        return subject_of(_compiled(str(given)))
    if not found.trace.steps or not found.report.passes:
        raise NoRecordError(
            f"{given if isinstance(given, (str, Path)) else found.name} holds no trace of its "
            "passes: it was saved before programs kept theirs, or it is a dump with filters; "
            "compile it again"
        )
    return found


def _compiled(model: str) -> Program:
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise UnsupportedError(
            f"{model} is neither a saved program, nor a dump, nor a model: it has no manifest.json "
            "and no config.json"
        )
    is_packed = model in BUILTINS or model.endswith(".gguf")
    return compile(load(model, weights="packed" if is_packed else "dense"), backend="reference")
