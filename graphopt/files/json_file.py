"""The one reader of JSON: every file of it comes from somebody else.

Contract: a regular file of at most `most_bytes`, UTF-8, at most `MOST_DEPTH` values inside one
another, no name twice in an object with two values. Anything else raises the error class that the
caller names, with the path. What the values are is the caller's to check.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptError
from graphopt.files.regular_file import check_regular

MOST_DEPTH = 100
MOST_BYTES = 1 << 28
"""A tokenizer of a quarter of a million tokens takes 35 MB."""


def read_json(path: Path, error: type[GraphoptError], *, most_bytes: int = MOST_BYTES) -> Any:
    """The value in the JSON file `path`."""
    size = check_regular(path, error)
    if size > most_bytes:
        raise error(f"{path} has {size} bytes; at most {most_bytes} are read")
    try:
        data = path.read_bytes()
    except OSError as failure:
        raise error(f"{path} cannot be read: {failure}") from failure
    return parse_json(data, str(path), error)


def read_object(
    path: Path, error: type[GraphoptError], *, most_bytes: int = MOST_BYTES
) -> dict[str, Any]:
    """The object in the JSON file `path`; any other value is an error, too."""
    value = read_json(path, error, most_bytes=most_bytes)
    if not isinstance(value, dict):
        raise error(f"{path} is damaged: it holds a {type(value).__name__} and must be an object")
    return value


def parse_json(data: bytes | str, name: str, error: type[GraphoptError]) -> Any:
    """The value of a JSON text; `name` is what errors call it."""
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        value = json.loads(text, object_pairs_hook=_object)
    # UnicodeDecodeError and JSONDecodeError are both of this kind.
    except ValueError as failure:
        raise error(f"{name} is damaged: it is not valid JSON: {failure}") from failure
    except RecursionError:
        raise _too_deep(name, error) from None
    if _is_deep(value):
        raise _too_deep(name, error)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        for name, value in pairs:
            if result[name] != value:
                raise ValueError(
                    f"{name!r} is there twice, as {value!r:.60} and {result[name]!r:.60}"
                )
    return result


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        level = inner
        if not level:
            return False
    return True


def _too_deep(name: str, error: type[GraphoptError]) -> GraphoptError:
    return error(f"{name} is damaged: its values are nested more than {MOST_DEPTH} deep")
