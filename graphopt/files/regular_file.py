"""Files that are read from a folder somebody else made: regular ones, and nothing else.

Opening a named pipe waits for a writer, a device has no end, and a link may point at either. Every
reader asks here before it opens anything.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from graphopt.errors import GraphoptError

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(path: Path, error: type[GraphoptError]) -> int:
    """Size in bytes of the regular file `path`; links are followed.

    Raises `error` naming the path when there is none, it is of another kind, or nobody may look.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        what = "is a link to nothing" if os.path.islink(path) else "is missing"
        raise error(f"{path} {what}") from None
    except (OSError, ValueError) as failure:
        raise error(f"{path} cannot be read: {failure}") from failure
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for test, name in _KINDS if test(found.st_mode)), "no regular file")
        raise error(f"{path} is damaged: it is {kind}, and must be a regular file")
    return found.st_size


def check_all_regular(paths: Iterable[Path], error: type[GraphoptError]) -> None:
    """`check_regular` for each, in order."""
    for path in paths:
        check_regular(path, error)
