"""A program on disk: graph text, safetensors, a manifest. No pickle.

    folder/manifest.json        format, versions, options, sha256 of every other file
           forward.gir          the optimised forward
           serving.gir          the graph with the KV cache (absent when there is none)
           report.json          what every pass did with every candidate, for `explain`
           trace/               the graph text as each pass left it, for dumps and the explorer
           weights.safetensors  every weight once, by name
           tokenizer/           as transformers saves it (absent for models without one)

Loading checks every hash before anything is read.
"""

from __future__ import annotations

import glob
import json
import re
import shutil
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from graphopt.codegen.registry import select
from graphopt.errors import ProgramFormatError, VerifyError
from graphopt.files.json_file import parse_json, read_object
from graphopt.files.paths import as_path
from graphopt.files.regular_file import check_regular
from graphopt.ir.graph import Graph
from graphopt.ir.text.parser import parse_graph
from graphopt.ir.text.printer import print_graph
from graphopt.ir.verify import verify
from graphopt.program.manifest import (
    FORWARD,
    MANIFEST,
    SERVING,
    WEIGHTS,
    read_manifest,
    write_manifest,
)
from graphopt.program.options import check_threads
from graphopt.program.program import Program
from graphopt.record.report import Report
from graphopt.record.trace import read_trace

REPORT, TRACE = "report.json", "trace"
_YOUNG_SECONDS = 60
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def is_program(folder: Path) -> bool:
    """True for a folder that `save` wrote."""
    return (folder / MANIFEST).is_file()


def save_program(program: Program, folder: str | Path) -> None:
    """Write `program` to `folder`, which must be new or empty.

    Everything is written beside it first and renamed at the end: an interrupted save leaves no
    half program, and what a killed one left is removed by the next save to that place. Modes are
    those that the umask gives. Raises ProgramFormatError for what is no path, a folder that holds
    something or cannot be written, and for weights of a kind that a program cannot store.
    """
    path = as_path(folder, ProgramFormatError)
    weights = _storable(program)
    try:
        _save(program, weights, path)
    except (OSError, SafetensorError) as error:
        raise ProgramFormatError(f"{path} could not be written: {error}") from error


def _save(program: Program, weights: dict[str, Tensor], folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ProgramFormatError(f"{folder} exists and is not an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    scratch = folder.parent / f".{folder.name}-{uuid4().hex[:12]}"
    scratch.mkdir()
    try:
        with FileLock(_lock_of(scratch)):
            _write(program, weights, scratch)
            # safetensors writes for the owner alone, whatever the umask.
            (scratch / WEIGHTS).chmod(scratch.stat().st_mode & 0o666)
            if folder.exists():
                folder.rmdir()
            scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    finally:
        _lock_of(scratch).unlink(missing_ok=True)


def _lock_of(scratch: Path) -> Path:
    """Held while somebody writes to `scratch`."""
    return scratch.with_name(f"{scratch.name}.lock")


def _remove_leftovers(folder: Path) -> None:
    """Folders of saves to `folder` that nobody is writing any more."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}-*"):
        is_ours = re.fullmatch(r"[0-9a-f]{12}", left.name.rpartition("-")[2])
        # A younger one may not have its lock yet.
        if is_ours and time.time() - left.stat().st_mtime > _YOUNG_SECONDS:
            with suppress(OSError, Timeout), FileLock(_lock_of(left), timeout=0):
                shutil.rmtree(left, ignore_errors=True)
                _lock_of(left).unlink(missing_ok=True)


def _storable(program: Program) -> dict[str, Tensor]:
    weights = dict(program.weights())
    for name, data in weights.items():
        if data.device.type == "meta":
            raise ProgramFormatError(f"weight {name!r} has no data to save")
        if data.dtype not in _DTYPES.values() or data.layout != torch.strided:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES.values())
            raise ProgramFormatError(
                f"weight {name!r} is {data.dtype} ({data.layout}), which a program cannot store; "
                f"it can: dense {known}"
            )
    return weights


def _write(program: Program, weights: dict[str, Tensor], folder: Path) -> None:
    dense = {name: t.resolve_conj().contiguous() for name, t in _unshared(weights).items()}
    save_file(dense, folder / WEIGHTS)
    (folder / FORWARD).write_text(print_graph(program.graph), encoding="utf-8")
    if program.serving is not None:
        (folder / SERVING).write_text(print_graph(program.serving), encoding="utf-8")
    (folder / REPORT).write_text(json.dumps(program.report.to_dict()))
    program.trace.write(folder / TRACE)
    if program.tokenizer is not None:
        program.tokenizer.save_pretrained(folder / "tokenizer")
    write_manifest(program, folder)


def _unshared(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory."""
    seen: set[int] = set()
    result = {}
    for name, data in weights.items():
        address = data.untyped_storage().data_ptr()
        result[name] = data.clone() if address in seen else data
        seen.add(address)
    return result


def load_program(
    folder: str | Path,
    *,
    backend: str | None = None,
    threads: int | None = None,
    namespaces: Collection[str] = (),
) -> Program:
    """Load what `Program.save` wrote.

    backend: run on another backend than the one it was compiled for. threads: of the cpu backend.
    namespaces: of the torch ops of a model's own library, which must be imported before.
    Raises ProgramFormatError when a file is missing, altered, unlisted or unreadable.
    """
    started = time.perf_counter()
    path = as_path(folder, ProgramFormatError)
    manifest = read_manifest(path)
    options = manifest.options
    if backend is not None:
        options = replace(options, backend=backend)
    check_threads(options.backend, threads)
    weights = mapped_weights(path / WEIGHTS)
    graph = _read_graph(path / FORWARD, weights, namespaces, "captured")
    graph.limits = (*graph.limits, *manifest.limits)
    serving = None
    if manifest.serving:
        serving = _read_graph(path / SERVING, weights, namespaces, "serving")
    report = _read_report(path)
    report.seconds["read"] = time.perf_counter() - started
    tokenizer = _read_tokenizer(path / "tokenizer")
    with report.timed("lower"):
        chosen = select(options.backend, report.note, threads)
        del weights
        trace = read_trace(path / TRACE)
        program = Program(
            graph, serving, manifest.refusal, options, chosen, report, tokenizer, trace
        )
    return program


def load_report(folder: str | Path) -> Report:
    """The report of a saved program, without loading the program.

    Empty for a program that was saved before reports were. Raises ProgramFormatError as
    `load_program` does.
    """
    path = as_path(folder, ProgramFormatError)
    read_manifest(path)
    return _read_report(path)


def _read_graph(
    file: Path, weights: dict[str, Tensor], namespaces: Collection[str], dialect: str
) -> Graph:
    """A graph that the verifier accepts: a hash says that a file is the one that was saved, not
    that what was saved is a graph. Raises ProgramFormatError."""
    try:
        graph = parse_graph(_text(file), weights, namespaces=namespaces)
        verify(graph)
    except (ProgramFormatError, VerifyError) as error:
        raise ProgramFormatError(f"{file} is damaged: {error}") from error
    if graph.dialect != dialect:
        raise ProgramFormatError(f"{file} is damaged: it is a {graph.dialect} graph, not {dialect}")
    return graph


def _text(file: Path) -> str:
    check_regular(file, ProgramFormatError)
    try:
        return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ProgramFormatError(f"{file} is damaged: {error!r}") from error


def _read_tokenizer(folder: Path) -> Any:
    if not folder.is_dir():
        return None
    # transformers takes seconds to import, and few programs need it.
    from graphopt.models.tokenizer_folder import read_tokenizer

    return read_tokenizer(folder, ProgramFormatError, "save the program again")


def _read_report(folder: Path) -> Report:
    file = folder / REPORT
    if not file.exists():
        return Report()
    try:
        return Report.from_dict(read_object(file, ProgramFormatError))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProgramFormatError(f"{file} is damaged: {error!r}") from error


def mapped_weights(path: Path) -> dict[str, Tensor]:
    """Weights of a safetensors file, each a mapping of its own.

    The pages of a weight go when the weight is released; safetensors maps the file as a whole, and
    its pages stay for as long as any weight does. Raises ProgramFormatError for a damaged file.
    """
    check_regular(path, ProgramFormatError)
    try:
        # Opening checks the whole header.
        with safe_open(path, framework="pt"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = parse_json(file.read(length), str(path), ProgramFormatError)
    except (SafetensorError, OSError) as error:
        raise ProgramFormatError(f"{path} is damaged: {error}") from error
    header.pop("__metadata__", None)
    weights = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in _DTYPES:
            raise ProgramFormatError(f"{path} holds {name!r} of unknown type {entry['dtype']!r}")
        dtype = _DTYPES[entry["dtype"]]
        if begin == end:
            weights[name] = torch.empty(entry["shape"], dtype=dtype)
            continue
        # Copy on write: torch wants memory it may write to.
        mapping = np.memmap(path, np.uint8, "c", offset=8 + length + begin, shape=end - begin)
        weights[name] = torch.from_numpy(mapping).view(dtype).view(entry["shape"])
    return weights
