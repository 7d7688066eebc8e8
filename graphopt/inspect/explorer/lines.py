"""Reads the lines of a `.gir` text for showing them: the one place that takes them apart.

Nothing is checked and no weights are needed; a line of an unknown kind is kept as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from graphopt.ir.text.history import read_history

Kind = Literal["call", "input", "weight", "return", "head"]
_CALL = re.compile(
    r"(?P<id>%\d+) : (?P<type>.+?) = (?P<op>[\w.]+)\((?P<args>.*)\)"
    r"(?:  # (?P<layer>[^|]*?)(?: \| (?P<source>[^|]*?)(?: \| (?P<history>.*))?)?)?"
)
_DECLARED = re.compile(
    r"(?P<kind>input|weight) (?P<id>[%@][^ ]+) : (?P<type>.+?)(?: (?P<use>user|cache))?"
)
_REFERENCE = re.compile(r"\"(?:[^\"\\]|\\.)*\"|([%@][\w.]+)")


@dataclass(frozen=True, slots=True)
class GraphLine:
    """One line.

    id: "%12", "%ids", "@norm.weight"; "" for return and head lines. type: "f32[batch, 64]", "none"
    of a call that writes. op: "aten.linear". args: the text between the parentheses; of a return
    its values, of an input "user" or "cache", of a head line all of it. references: values and
    weights named in args, each once.
    layer, source, history: from the comment; history is the value itself where the text has none.
    """

    kind: Kind
    id: str = ""
    type: str = ""
    op: str = ""
    args: str = ""
    references: tuple[str, ...] = ()
    layer: str = ""
    source: str = ""
    history: tuple[str, ...] = ()


def read_lines(text: str) -> list[GraphLine]:
    """All lines of a graph text, in order; empty ones are left out."""
    return [_line(line) for line in text.splitlines() if line.strip()]


def _line(line: str) -> GraphLine:
    call = _CALL.fullmatch(line)
    if call:
        history = read_history(call["history"] or call["id"])
        return GraphLine(
            "call",
            call["id"],
            call["type"],
            call["op"],
            call["args"],
            references(call["args"]),
            (call["layer"] or "").strip(),
            (call["source"] or "").strip(),
            tuple(sorted(history, key=lambda name: (len(name), name))),
        )
    declared = _DECLARED.fullmatch(line)
    if declared:
        kind: Kind = "input" if declared["kind"] == "input" else "weight"
        return GraphLine(kind, declared["id"], declared["type"], args=declared["use"] or "")
    if line.startswith("return "):
        values = line.removeprefix("return ")
        return GraphLine("return", args=values, references=references(values))
    return GraphLine("head", args=line)


def references(text: str) -> tuple[str, ...]:
    """Values and weights that a text names outside of strings, each once, in order."""
    found = (match[1] for match in _REFERENCE.finditer(text))
    return tuple(dict.fromkeys(name for name in found if name))
