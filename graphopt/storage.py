"""A program on disk: graph text, safetensors, a manifest. No pickle.

    folder/manifest.json        format, versions, options, sha256 of every other file
           forward.gir          the optimised forward
           serving.gir          the graph with the KV cache (absent when there is none)
           weights.safetensors  every weight once, by name
           tokenizer/           as transformers saves it (absent for models without one)

Loading checks every hash before anything is read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import graphopt
from graphopt.codegen.cpu.backend import select
from graphopt.errors import ProgramFormatError
from graphopt.ir.parser import parse_graph
from graphopt.ir.printer import print_graph
from graphopt.program import Program, ProgramOptions
from graphopt.report import Rejection, Report

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
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
}


def is_program(folder: Path) -> bool:
    """True for a folder that `save` wrote."""
    return (folder / MANIFEST).is_file()


def save_program(program: Program, folder: Path) -> None:
    """Write `program` to `folder`, which must be new or empty.

    Everything is written beside it first and renamed at the end: an interrupted save leaves no
    half program. Raises ProgramFormatError for a folder that holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ProgramFormatError(f"{folder} exists and is not an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        _write(program, scratch)
        if folder.exists():
            folder.rmdir()
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _write(program: Program, folder: Path) -> None:
    weights = dict(program.weights())
    missing = [name for name, data in weights.items() if data.device.type == "meta"]
    if missing:
        raise ProgramFormatError(f"weight {missing[0]!r} has no data to save")
    save_file({n: t.contiguous() for n, t in _unshared(weights).items()}, folder / WEIGHTS)
    (folder / "forward.gir").write_text(print_graph(program.graph))
    if program.serving is not None:
        (folder / "serving.gir").write_text(print_graph(program.serving))
    if program.tokenizer is not None:
        program.tokenizer.save_pretrained(folder / "tokenizer")
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    manifest = {
        "format": FORMAT,
        "graphopt": graphopt.__version__,
        "torch": torch.__version__,
        "options": asdict(program.options),
        "refusal": None if program.refusal is None else asdict(program.refusal),
        "files": {p.relative_to(folder).as_posix(): _sha256(p) for p in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


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
    folder: str | Path, *, backend: str | None = None, threads: int | None = None
) -> Program:
    """Load what `Program.save` wrote.

    backend: run on another backend than the one it was compiled for. threads: of the cpu backend.
    Raises ProgramFormatError when a file is missing, altered, unlisted or unreadable.
    """
    start = time.perf_counter()
    path = Path(folder)
    manifest = check_manifest(path)
    options = ProgramOptions(
        **{
            **manifest["options"],
            "eos_token_ids": tuple(manifest["options"]["eos_token_ids"]),
            **({} if backend is None else {"backend": backend}),
        }
    )
    refusal = None if manifest["refusal"] is None else Rejection(**manifest["refusal"])
    weights = mapped_weights(path / WEIGHTS)
    graph = parse_graph((path / "forward.gir").read_text(), weights)
    serving_text = path / "serving.gir"
    serving = parse_graph(serving_text.read_text(), weights) if serving_text.exists() else None
    report = Report()
    report.seconds["read"] = time.perf_counter() - start
    tokenizer = None
    if (path / "tokenizer").is_dir():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path / "tokenizer")
    lowering = time.perf_counter()
    chosen = select(options.backend, report, threads)
    del weights
    program = Program(graph, serving, refusal, options, chosen, report, tokenizer)
    report.seconds["lower"] = time.perf_counter() - lowering
    return program


def mapped_weights(path: Path) -> dict[str, Tensor]:
    """Weights of a safetensors file, each a mapping of its own.

    The pages of a weight go when the weight is released; safetensors maps the file as a whole, and
    its pages stay for as long as any weight does. Raises ProgramFormatError for a damaged file.
    """
    try:
        # Opening checks the whole header.
        with safe_open(path, framework="pt"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise ProgramFormatError(f"{path} is damaged: {error}") from error
    header.pop("__metadata__", None)
    weights = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype = _DTYPES[entry["dtype"]]
        if begin == end:
            weights[name] = torch.empty(entry["shape"], dtype=dtype)
            continue
        # Copy on write: torch wants memory it may write to.
        mapping = np.memmap(path, np.uint8, "c", offset=8 + length + begin, shape=end - begin)
        weights[name] = torch.from_numpy(mapping).view(dtype).view(entry["shape"])
    return weights


def check_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after every file was found to be what it says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        listed: dict[str, str] = manifest["files"]
        version = manifest["format"]
        _ = manifest["options"]["eos_token_ids"], manifest["refusal"]
    except FileNotFoundError:
        raise ProgramFormatError(f"{folder} is no saved program: {MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ProgramFormatError(f"{folder / MANIFEST} is damaged: {error!r}") from error
    if version != FORMAT:
        raise ProgramFormatError(f"{folder} has format {version}, this graphopt reads {FORMAT}")
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {
        MANIFEST
    }
    for name in sorted(present - set(listed)):
        raise ProgramFormatError(f"{folder / name} is not listed in the manifest")
    for name, expected in listed.items():
        if name not in present:
            raise ProgramFormatError(f"{folder / name} is missing")
        if _sha256(folder / name) != expected:
            raise ProgramFormatError(f"{folder / name} was altered: its sha256 differs")
    for name in ("forward.gir", WEIGHTS):
        if name not in listed:
            raise ProgramFormatError(f"{folder} is incomplete: {name} is missing")
    return dict(manifest)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
