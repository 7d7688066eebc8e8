"""One line of a call in a graph text, taken apart: number, type, op, tokens of the arguments, and
the parts of its comment. Time and memory are linear in the length of the line, whatever it holds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Token = tuple[str, str]
"""(kind, text); kinds: string, ref, number, word, mark."""

_TOKEN = re.compile(
    r"\s*(?:(?P<string>\"(?:[^\"\\]|\\.)*\")|(?P<ref>[%@][\w.\\]+)"
    r"|(?P<number>-?[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)|(?P<word>[A-Za-z_][\w.]*)"
    r"|(?P<mark>[][(),=]))"
)
_LEFT = re.compile(r"(%(?:0|[1-9][0-9]{0,17}))\s*:(.*)", re.DOTALL)
_OP = re.compile(r"\s*([\w.]+)\s*\(")


@dataclass(frozen=True, slots=True)
class CallLine:
    """number: "%12". type: as written. comment: layer, source, history, "" where it ends before."""

    number: str
    type: str
    op: str
    arguments: tuple[Token, ...]
    comment: tuple[str, str, str]


def read_call(line: str) -> CallLine | None:
    """The parts of a call line; None for other lines. Raises ValueError for tokens that are none.

    A type has no "=", and arguments have no parentheses.
    """
    written, _, rest = line.partition("=")
    left, op = _LEFT.fullmatch(written), _OP.match(rest)
    if left is None or op is None:
        return None
    tokens: list[Token] = []
    position = op.end()
    while not tokens or tokens[-1] != ("mark", ")"):
        match = _TOKEN.match(rest, position)
        if match is None or match.lastgroup is None:
            found = rest[position : position + 30].strip()
            raise ValueError(f"cannot read {found!r}" if found else "a ')' is missing")
        tokens.append((match.lastgroup, match[match.lastgroup]))
        position = match.end()
    after = rest[position:].strip()
    if after and not after.startswith("#"):
        raise ValueError(f"text after the call: {after[:30]!r}")
    parts = [part.strip() for part in after.removeprefix("#").split("|", 2)]
    layer, source, history = (*parts, "", "")[:3]
    return CallLine(left[1], left[2].strip(), op[1], tuple(tokens[:-1]), (layer, source, history))
