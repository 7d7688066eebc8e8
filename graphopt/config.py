"""Settings that come from the environment: the only file of graphopt that reads `os.environ`.

| field    | variable          | default           | meaning                                    |
|----------|-------------------|-------------------|--------------------------------------------|
| cache    | GRAPHOPT_CACHE    | ~/.cache/graphopt | folder for fetched and converted files     |
| offline  | GRAPHOPT_OFFLINE  | 0                 | 1: never touch the network                 |
| check    | GRAPHOPT_CHECK    | 0                 | 1: `compile` checks every pass's numerics  |
| dump     | GRAPHOPT_DUMP     | none              | folder for what `compile` dumps            |
| editor   | VISUAL, EDITOR    | none              | command line that edits a text file        |
| reread   | GRAPHOPT_REREAD   | 0                 | 1: every graph text is read back, compared |
| cxxflags | GRAPHOPT_CXXFLAGS | none              | further flags of the C++ compiler          |

Functions take a `Config` and read `Config.from_environment()` only when they were given none, so
that a program can set everything in code.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graphopt.errors import UnsupportedError

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"", "0", "false", "no", "off"})


@dataclass(frozen=True, slots=True)
class Config:
    """What the user set about the surroundings, not about a model. See the table above."""

    cache: Path
    offline: bool = False
    check: bool = False
    dump: Path | None = None
    reread: bool = False
    editor: str = ""
    cxxflags: tuple[str, ...] = ()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Config:
        """Read `environment` (default `os.environ`). Raises UnsupportedError on a bad flag,
        the home of an unknown user, or compiler flags with an open quote."""
        env = os.environ if environment is None else environment
        cache = env.get("GRAPHOPT_CACHE") or "~/.cache/graphopt"
        dump = env.get("GRAPHOPT_DUMP")
        return cls(
            cache=_folder("GRAPHOPT_CACHE", cache),
            offline=_flag(env, "GRAPHOPT_OFFLINE"),
            check=_flag(env, "GRAPHOPT_CHECK"),
            dump=_folder("GRAPHOPT_DUMP", dump) if dump else None,
            reread=_flag(env, "GRAPHOPT_REREAD"),
            editor=env.get("VISUAL") or env.get("EDITOR") or "",
            cxxflags=_words(env, "GRAPHOPT_CXXFLAGS"),
        )


def _folder(variable: str, text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UnsupportedError(f"{variable}={text!r} names no folder: {error}") from error


def _words(env: Mapping[str, str], variable: str) -> tuple[str, ...]:
    text = env.get(variable, "")
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UnsupportedError(
            f"{variable}={text!r} cannot be split into flags: {error}"
        ) from error


def _flag(env: Mapping[str, str], variable: str) -> bool:
    text = env.get(variable, "").strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise UnsupportedError(f"{variable}={text!r} is neither on (1) nor off (0)")


def child_environment(**overrides: str) -> dict[str, str]:
    """This process's environment with `overrides`, for a child process."""
    return {**os.environ, **overrides}
