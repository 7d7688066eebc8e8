"""The history of a value as text: `%2, %17-24, fuse_norm#0`.

Captured values come first, in order, neighbours as a range; then inputs, weights and the rewrites.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBERED = re.compile(r"%([0-9]+)")
_RANGE = re.compile(r"%([0-9]{1,18})-([0-9]{1,18})")
_NO_VALUE = re.compile(r"%[0-9]{19,}")


def write_history(names: Iterable[str]) -> str:
    """One text for one set of names."""
    numbers: list[int] = []
    others: list[tuple[bool, str, int, str]] = []
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match:
            numbers.append(int(match[1]))
        else:
            stem, mark, index = name.rpartition("#")
            others.append((bool(mark), stem, int(index) if index.isdecimal() else 0, name))
    return ", ".join([*_ranges(sorted(set(numbers))), *(other[-1] for other in sorted(others))])


def _ranges(numbers: Iterable[int]) -> list[str]:
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return [f"%{first}-{last}" if last > first else f"%{first}" for first, last in spans]


def read_history(text: str, most: int = 1_000_000) -> frozenset[str]:
    """The names of a text that `write_history` made; a range of more than `most` is a name. Raises
    ValueError when the ranges together are more, and for values whose number no graph has."""
    names: set[str] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _RANGE.fullmatch(part)
        if match and int(match[2]) - int(match[1]) < most:
            names.update(f"%{number}" for number in range(int(match[1]), int(match[2]) + 1))
        elif _NO_VALUE.match(part):
            raise ValueError(f"no value has the number {part[:24]}...")
        else:
            names.add(part)
        if len(names) > most:
            raise ValueError(f"the histories name more than {most:,} values")
    return frozenset(names)
