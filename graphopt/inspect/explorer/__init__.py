"""`graphopt.explore`: one HTML file that shows what every pass of a compilation did."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from graphopt.errors import UnsupportedError
from graphopt.files.paths import as_path
from graphopt.inspect.explorer.data import page_data
from graphopt.inspect.explorer.page import MARKER, render
from graphopt.inspect.explorer.subject import subject_of
from graphopt.passes.recipe import is_count
from graphopt.program.program import Program

_MOST = 1_000_000


def explore(
    subject: Program | str | Path,
    out: str | Path,
    *,
    batch: int = 1,
    sequence: int = 512,
    force: bool = False,
) -> Path:
    """Write the page to `out`, which is returned. It needs no network and no other file.

    subject: a program; the folder of a saved program or of a dump; or a model as
        `graphopt.models.load` takes it.
    batch, sequence: sizes that FLOPs and bytes are computed for; in a serving graph, requests and
        the tokens of each.
    force: replace a file that is no explorer page.

    Raises UnsupportedError for sizes below 1, an `out` in no folder or that is a folder, a file
    that is no explorer page, and a folder that is neither a program nor a dump nor a model;
    NoRecordError for a program that was saved without its trace.
    """
    path = as_path(out, UnsupportedError, "file")
    for name, size in (("batch", batch), ("sequence", sequence)):
        if not is_count(size) or not 1 <= size <= _MOST:
            raise UnsupportedError(f"{name}={size!r} is not supported; give 1 to {_MOST}")
    _check_out(path, force)
    text = render(page_data(subject_of(subject), batch, sequence))
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise UnsupportedError(f"{path} cannot be written: {error}") from None
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
    return path


def _check_out(path: Path, force: bool) -> None:
    if not path.parent.is_dir():
        raise UnsupportedError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.is_dir():
        raise UnsupportedError(f"{path} is a folder; give a file, such as {path / 'explore.html'}")
    if path.exists() and not force and not _is_page(path):
        raise UnsupportedError(
            f"{path} exists and is no explorer page; force replaces it (--force)"
        )


def _is_page(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return MARKER in file.read(200)
    except OSError as error:
        raise UnsupportedError(f"{path} cannot be read: {error}") from error
