"""Golden files: graphs as `.gir` text beside the tests, compared by structure.

    one section     the graph
    two sections    the graph before a pass, a line `=== after fuse_norm ===`, the graph after it

Two graphs are equal when they have the same name, inputs, weights (names and types), calls with
their arguments and types, and outputs. Numbers of values, comments (the layer too), white space and
what the weights hold do not matter, so a file may be written and annotated by hand.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import torch
from torch import Tensor

from graphopt.errors import GoldenError, ProgramFormatError
from graphopt.ir.graph import Graph
from graphopt.ir.text.parser import parse_graph
from graphopt.ir.text.printer import canonical_text
from graphopt.ir.weights import PackedWeight
from graphopt.record.diff import collapsed_diff

_SEPARATOR = re.compile(r"\s*===\s*after\s+(?P<name>\S+)\s*===\s*")
_VALUE = re.compile(r"%(\d+)\b")


@dataclass(frozen=True, slots=True)
class Golden:
    """The text of a golden file.

    sections: one graph text, or the texts before and after a pass. pass_name: that pass, "" for one
    section. starts: lines of the file above each section.
    """

    sections: tuple[str, ...]
    pass_name: str = ""
    starts: tuple[int, ...] = (0,)

    def graph(
        self,
        index: int,
        weights: Mapping[str, Tensor] | None = None,
        packed: Mapping[str, PackedWeight] | None = None,
        namespaces: Collection[str] = (),
    ) -> Graph:
        """Section `index` as a graph. Weights that are not given are random, always the same ones.

        namespaces: as for `parse_graph`: of a model's own torch ops.
        Raises ProgramFormatError with the line of the file.
        """
        # Blank lines stand for what is above the section, so that the parser counts them.
        text = "\n" * self.starts[index] + self.sections[index]
        return parse_graph(text, _RandomWeights(weights or {}), packed, namespaces)


def read_golden(path: Path) -> Golden:
    """What the file holds. Raises GoldenError when it cannot be read or has three sections."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GoldenError(f"{shown(path)} cannot be read: {error}") from error
    marks = [
        (at, match["name"]) for at, x in enumerate(lines) if (match := _SEPARATOR.fullmatch(x))
    ]
    if not marks:
        return Golden(("\n".join([*lines, ""]),))
    if len(marks) > 1:
        raise GoldenError(
            f"{shown(path)}: line {marks[1][0] + 1}: a golden file has two sections at most"
        )
    ((at, name),) = marks
    sections = ("\n".join([*lines[:at], ""]), "\n".join([*lines[at + 1 :], ""]))
    return Golden(sections, name, (0, at + 1))


def shown(path: Path) -> str:
    """`path` for messages: from the current folder when it is below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def golden_text(sections: Sequence[str], pass_name: str) -> str:
    """The text of a golden file; `pass_name` is "" for one section."""
    if not pass_name:
        (section,) = sections
        return section
    before, after = sections
    return f"{before}=== after {pass_name} ===\n{after}"


def structure(graph: Graph) -> str:
    """The part of `graph` that is compared, as canonical text."""
    bare = graph.copy()
    for node in bare.nodes:
        node.meta["layer"] = ""
    return canonical_text(bare)


def difference(golden: Graph, found: Graph, golden_title: str, found_title: str) -> str:
    """What differs between two structures, as a collapsed diff; "" for equal ones.

    By value: a value that both have has one number in the diff, so that a new call in the middle
    does not change every line below it.
    """
    if structure(golden) == structure(found):
        return ""
    old = canonical_text(golden)
    new = _numbered_like(old.splitlines(), canonical_text(found).splitlines())
    return collapsed_diff(old, "\n".join([*new, ""]), golden_title, found_title).rstrip()


def _numbered_like(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """`new`, its values numbered as the same ones of `old`; others are numbered on from there.

    A line that says the same as the line of its value in `old` becomes that line, comment and all.
    """
    names: dict[str, str] = {}
    for at, to in _pairs([_blind(line) for line in old], [_blind(line) for line in new]):
        theirs, ours = _VALUE.match(old[at]), _VALUE.match(new[to])
        if theirs and ours:
            names[ours[1]] = theirs[1]
    known = {match[1]: line for line in old if (match := _VALUE.match(line))}
    following = 1 + max(map(int, known), default=-1)
    lines = []
    for line in new:
        match = _VALUE.match(line)
        if match and match[1] not in names:
            names[match[1]] = str(following)
            following += 1
        renamed = _VALUE.sub(lambda m: f"%{names.get(m[1], m[1])}", line)
        same = known.get(names[match[1]], "") if match else ""
        lines.append(same if _code(same) == _code(renamed) else renamed)
    return lines


def _pairs(old: Sequence[str], new: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Places of lines that belong together: equal ones, between those calls of one op, and between
    those what stands in the place of something else: at least the last, which is the result."""
    for tag, at, to in _ranges(old, new):
        if tag == "equal":
            yield from zip(at, to, strict=True)
        elif tag == "replace":
            ops = [[_op(lines[i]) for i in place] for lines, place in ((old, at), (new, to))]
            for like, a, b in _ranges(*ops):
                if like == "equal" or (like == "replace" and len(a) == len(b)):
                    yield from ((at[i], to[j]) for i, j in zip(a, b, strict=True))
                elif like == "replace":
                    yield at[a[-1]], to[b[-1]]


def _ranges(old: Sequence[str], new: Sequence[str]) -> list[tuple[str, range, range]]:
    opcodes = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return [(tag, range(a, b), range(c, d)) for tag, a, b, c, d in opcodes]


def _code(line: str) -> str:
    return line.partition("  # ")[0]


def _blind(line: str) -> str:
    """A line without its comment and the numbers of values."""
    return _VALUE.sub("%", _code(line))


def _op(line: str) -> str:
    return line.partition(" = ")[2].partition("(")[0]


class _RandomWeights:
    """Data for the weights that a text names: what is given, otherwise seeded noise."""

    def __init__(self, given: Mapping[str, Tensor]) -> None:
        self._given = given
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if name in self._given:
            return self._given[name]
        if dtype.is_floating_point or dtype.is_complex:
            wide = dtype if dtype.is_complex else torch.float32
            return torch.randn(shape, dtype=wide, generator=self._generator).to(dtype)
        return torch.randint(0, 2, shape, generator=self._generator).to(dtype)


def read_sections(golden: Golden, path: Path, namespaces: Collection[str] = ()) -> list[Graph]:
    """The sections as graphs. Raises GoldenError with the file and the line."""
    try:
        places = range(len(golden.sections))
        return [golden.graph(index, namespaces=namespaces) for index in places]
    except ProgramFormatError as error:
        raise GoldenError(f"{shown(path)}: {error}") from error
