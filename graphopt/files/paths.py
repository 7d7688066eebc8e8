"""Paths that callers give, and files that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from graphopt.errors import GraphoptError


def as_path(value: Any, kind: type[GraphoptError], what: str = "folder") -> Path:
    """`value` as a Path. Raises `kind` for anything but text or a path object, for no text at all,
    and for a NUL, which no name has. what: that is asked for, "folder" or "file"."""
    given = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(given, str) or not given or "\0" in given:
        raise kind(f"{value!r} is no {what}; give its path as text or a Path")
    return Path(given)


class Written:
    """Files that are being written below one folder; `undo` takes them away again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[Path] = []
        self._folders: list[Path] = []

    def make(self, folder: Path) -> None:
        """Make a folder and those that it lies in, where they are missing."""
        missing = [f for f in (folder, *folder.parents) if not f.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._folders += missing

    def write(self, name: str, data: bytes) -> None:
        """Write one file, `name` below the folder."""
        path = self.folder / name
        self.make(path.parent)
        self._files.append(path)
        path.write_bytes(data)

    def undo(self) -> None:
        """Remove the files, and the folders that were made and hold nothing else."""
        for path in self._files:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        for folder in sorted(self._folders, key=lambda f: len(f.parts), reverse=True):
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def whole_folder(folder: Path, refused: Callable[[Exception], GraphoptError]) -> Iterator[None]:
    """Within, an empty or new folder is filled. When that fails it is as it was before, and what
    the system refused becomes what `refused` makes of it."""
    is_new = not folder.exists()
    made = Written(folder)
    try:
        made.make(folder)
        yield
    except BaseException as error:
        for path in folder.iterdir() if folder.is_dir() else ():
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if is_new:
            made.undo()
        if isinstance(error, (OSError, SafetensorError)):
            raise refused(error) from error
        raise
