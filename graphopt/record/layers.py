"""Module paths of identical layers as one: `model.layers.{0-29}.self_attn`.

Two layers are identical as far as their names tell when their paths differ in numbers only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<!\d)\d+(?=\.|$)")
_BLOCKS = (re.compile(r"(?:.*?\.)??\d+(?=\.|$)"), re.compile(r".*?\d+(?=\.|$)"))
_SPAN = re.compile(r"\{(\d+)-(\d+)\}")


def layer_shape(layer: str) -> str:
    """The path with its numbers left open: what identical layers share."""
    return _NUMBER.sub("#", layer)


def layer_block(layer: str) -> str:
    """The path up to its first number, `model.layers.7` of `model.layers.7.mlp`, or else to its
    first part with a number at its end, `block7` of `block7.mlp`; all of a path without either."""
    found = (pattern.match(layer) for pattern in _BLOCKS)
    return next((match[0] for match in found if match), layer)


def layer_numbers(layer: str) -> tuple[int, ...]:
    """The numbers that `layer_shape` leaves open."""
    return tuple(int(number) for number in _NUMBER.findall(layer))


def layer_range(layers: Iterable[str]) -> str:
    """Paths of one `layer_shape` in one: `layers.{0-3,7}.mlp`. Each number has its own range."""
    paths = list(dict.fromkeys(layers))
    numbers = [layer_numbers(path) for path in paths]
    ranges = iter([_ranges(set(column)) for column in zip(*numbers, strict=True)])
    return _NUMBER.sub(lambda _: next(ranges), paths[0])


def _ranges(values: set[int]) -> str:
    if len(values) == 1:
        return str(*values)
    spans: list[list[int]] = []
    for value in sorted(values):
        if spans and spans[-1][1] == value - 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    return "{" + ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in spans) + "}"


def members(name: str) -> list[str]:
    """The names that a range stands for: `a.{0-2}.b` -> a.0.b, a.1.b, a.2.b."""
    match = _SPAN.search(name)
    if match is None:
        return [name]
    numbers = range(int(match[1]), int(match[2]) + 1)
    return [f"{name[: match.start()]}{number}{name[match.end() :]}" for number in numbers]
