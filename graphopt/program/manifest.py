"""manifest.json of a saved program: what is in it, and that every file is what it says.

{"format": 1, "graphopt": ..., "torch": ...,
 "options": {name, backend, kv_dtype, max_context, eos_token_ids, default_sampling},
 "serving": true when there is a serving.gir, "refusal": why there is none, or null,
 "files": {path: sha256}}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from graphopt import __version__
from graphopt.errors import ProgramFormatError, RequestError
from graphopt.files.json_file import read_object
from graphopt.files.regular_file import check_all_regular
from graphopt.ir.limits import Limit
from graphopt.program.program import KV_DTYPES, Program, ProgramOptions
from graphopt.record.report import Rejection
from graphopt.runtime.request import sampling_from_plain

FORMAT = 1
MANIFEST = "manifest.json"
_MOST_BYTES = 1 << 24
FORWARD, SERVING, WEIGHTS = "forward.gir", "serving.gir", "weights.safetensors"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a program's manifest says beside the hashes.

    limits: of a program saved before the graph text had them. serving: a serving.gir belongs to it.
    """

    options: ProgramOptions
    limits: tuple[Limit, ...]
    refusal: Rejection | None
    serving: bool


def write_manifest(program: Program, folder: Path) -> None:
    """Write the manifest of everything that is in `folder`."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    manifest = {
        "format": FORMAT,
        "graphopt": __version__,
        "torch": torch.__version__,
        "options": asdict(program.options),
        "serving": program.serving is not None,
        "refusal": None if program.refusal is None else asdict(program.refusal),
        "files": {p.relative_to(folder).as_posix(): _sha256(p) for p in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest, after every file was found to be what it says.

    Raises ProgramFormatError when it is missing, damaged or of another format, and when a file is
    missing, altered or unlisted.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        raise ProgramFormatError(f"{folder} is no saved program: {MANIFEST} is missing")
    data = read_object(path, ProgramFormatError, most_bytes=_MOST_BYTES)
    entries = {"format": _is_int, "options": _is_dict, "files": _is_dict}
    for name, is_legal in entries.items():
        if not is_legal(data.get(name)):
            raise ProgramFormatError(f"{path} is damaged: {name!r} is missing or of another type")
    if data["format"] != FORMAT:
        raise ProgramFormatError(
            f"{folder} has format {data['format']}, this graphopt reads {FORMAT}"
        )
    files = data["files"]
    # An older program does not say these two.
    serving, limits = data.get("serving", SERVING in files), data.get("limits", {})
    if not _is_dict(limits) or not all(_is_int(limit) and limit > 0 for limit in limits.values()):
        raise ProgramFormatError(f"{path} is damaged: limits is {limits!r}")
    _check_files(folder, files, [FORWARD, WEIGHTS, *([SERVING] if serving else [])])
    refusal = data.get("refusal")
    return Manifest(
        _record(path, "options", ProgramOptions, data["options"], _OPTIONS),
        tuple(Limit(name, "<=", limit) for name, limit in limits.items()),
        None if refusal is None else _record(path, "refusal", Rejection, refusal, _REFUSAL),
        bool(serving),
    )


def _check_files(folder: Path, listed: Mapping[str, Any], needed: list[str]) -> None:
    found = [p for p in folder.rglob("*") if not p.is_dir()]
    check_all_regular(found, ProgramFormatError)
    present = {p.relative_to(folder).as_posix() for p in found}
    for name in sorted(present - {MANIFEST} - set(listed)):
        raise ProgramFormatError(f"{folder / name} is not listed in the manifest")
    for name, expected in listed.items():
        if name not in present:
            raise ProgramFormatError(f"{folder / name} is missing")
        if _sha256(folder / name) != expected:
            raise ProgramFormatError(f"{folder / name} was altered: its sha256 differs")
    for name in needed:
        if name not in listed:
            raise ProgramFormatError(f"{folder} is incomplete: {name} is missing")


def _record(
    path: Path, part: str, cls: type[Any], data: Any, legal: Mapping[str, Callable[[Any], bool]]
) -> Any:
    """A dataclass from its entries: all of them known, of their type, none missing."""
    wrong = f"{path} is damaged: {part} "
    if not _is_dict(data):
        raise ProgramFormatError(f"{wrong}is {data!r}")
    for name, value in data.items():
        if name not in legal:
            raise ProgramFormatError(f"{wrong}has an unknown entry {name!r}")
        if not legal[name](value):
            raise ProgramFormatError(f"{wrong}has {name}={value!r}")
    for field in fields(cls):
        is_needed = field.default is MISSING and field.default_factory is MISSING
        if is_needed and field.name not in data:
            raise ProgramFormatError(f"{wrong}has no {field.name!r}")
    return cls(**{k: _value(v) for k, v in data.items()})


def _value(data: Any) -> Any:
    if isinstance(data, list):
        return tuple(data)
    return sampling_from_plain(data) if isinstance(data, dict) else data


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ProgramFormatError(f"{path} cannot be read: {error}") from error


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_str(value: Any) -> bool:
    return isinstance(value, str)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_sampling(value: Any) -> bool:
    try:
        return _is_dict(value) and bool(sampling_from_plain(value))
    except RequestError:
        return False


_OPTIONS: dict[str, Callable[[Any], bool]] = {
    "name": _is_str,
    "backend": _is_str,
    "kv_dtype": lambda value: _is_str(value) and value in KV_DTYPES,
    "max_context": lambda value: value is None or (_is_int(value) and value > 0),
    "eos_token_ids": lambda value: (
        isinstance(value, list) and all(_is_int(v) and v >= 0 for v in value)
    ),
    "default_sampling": _is_sampling,
}
_REFUSAL: dict[str, Callable[[Any], bool]] = {field.name: _is_str for field in fields(Rejection)}
