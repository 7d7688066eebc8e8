"""Differences of two graph texts, by value: what a pass did, without what it left alone.

Values keep their numbers through passes, so a line of the text before belongs to the line after
with the same number. Lines that differ in their history only are the same. `align` puts the lines
side by side; `collapsed_diff` shows the changed ones, those of identical layers once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from graphopt.layers import layer_block, layer_range

Pair = tuple[str | None, str | None]

_REFERENCE = re.compile(r"%\d+(?!\w)")
_DIGITS = re.compile(r"\d+")
_NAME_NUMBER = re.compile(r"([%@][\w.]*?)(\d+)(?=[\s.])")
_OP = re.compile(r"= ([\w.]+)\(")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a graph text.

    text: the line. key: what it is about, `%12` for a value. body: the line without its history:
    lines of one body say the same. layer: module path, "" where there is none. op: "" where the
    line is no call.
    """

    text: str
    key: str
    body: str
    layer: str
    op: str


def read_line(text: str) -> Line:
    """Take a line of a `.gir` text apart; the canonical form has calls without a comment."""
    code, mark, comment = text.rpartition("  # ")
    call = _OP.search(code if mark else text)
    if not mark:
        return Line(text, _key(text), text, "", call[1] if call else "")
    parts = comment.split(" | ")
    body = "  # ".join([code, " | ".join(parts[:2]).rstrip()])
    return Line(text, _key(code), body, parts[0].strip(), call[1] if call else "")


def _key(code: str) -> str:
    """`%12` or `input %ids` or `weight @w`; other lines are their own key."""
    left = code.partition(" : ")[0]
    return code if left == code else left


def align(before: str, after: str) -> list[Pair]:
    """Lines of two graph texts side by side; None where one side has nothing.

    A pair of equal lines was left alone, or had its history extended; a pair of different lines is
    one value that changed. A graph that was rebuilt, so that no value is left, is paired by layer
    and op.
    """
    left = [read_line(line) for line in before.splitlines()]
    right = [read_line(line) for line in after.splitlines()]
    pairs: list[Pair] = []
    for a, b in _matched([line.key for line in left], [line.key for line in right]):
        if len(a) == len(b) == 1 and left[a[0]].key == right[b[0]].key:
            pairs.append((left[a[0]].text, right[b[0]].text))
        else:
            pairs += _rebuilt([left[i] for i in a], [right[i] for i in b])
    return pairs


def _rebuilt(left: Sequence[Line], right: Sequence[Line]) -> list[Pair]:
    """Lines without a common value, paired where layer and op are the same."""
    if not left or not right:
        return [(line.text, None) for line in left] + [(None, line.text) for line in right]
    pairs: list[Pair] = []
    names = [[f"{line.layer} {line.op or _DIGITS.sub('#', line.key)}" for line in side]
             for side in (left, right)]  # fmt: skip
    for a, b in _matched(*names):
        if len(a) == len(b) == 1 and names[0][a[0]] == names[1][b[0]] and left[a[0]].op:
            pairs.append((left[a[0]].text, right[b[0]].text))
        else:
            pairs += [(left[i].text, None) for i in a] + [(None, right[i].text) for i in b]
    return pairs


def _matched(left: Sequence[str], right: Sequence[str]) -> Iterable[tuple[range, range]]:
    """Ranges that belong together, in order: (one, one) for equal items, else what lies between."""
    matcher = SequenceMatcher(None, left, right, autojunk=False)
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "equal":
            yield from ((range(a + i, a + i + 1), range(c + i, c + i + 1)) for i in range(b - a))
        else:
            yield range(a, b), range(c, d)


def is_change(pair: Pair) -> bool:
    """False for lines that say the same."""
    before, after = pair
    if before is None or after is None:
        return True
    return before != after and read_line(before).body != read_line(after).body


@dataclass(frozen=True, slots=True)
class Hunk:
    """Changed lines of one layer, and of those that changed alike.

    pairs: of the first layer. layers: all of them; ("",) for calls outside of every layer, () for
    inputs, weights and outputs.
    """

    pairs: tuple[tuple[Line | None, Line | None], ...]
    layers: tuple[str, ...]

    @property
    def title(self) -> str:
        """`model.layers.{0-29}.mlp x30`."""
        if not self.layers:
            return "inputs, weights, outputs"
        where = layer_range(self.layers) if self.layers[0] else "outside of all layers"
        return f"{where} x{len(self.layers)}" if len(self.layers) > 1 else where

    def lines(self) -> list[str]:
        """`-` and `+` lines; what is removed stands before what is added in its place."""
        shown: list[str] = []
        added: list[str] = []
        for before, after in self.pairs:
            if before is not None and after is None:
                shown, added = shown + added, []
            shown += [] if before is None else [f"-{before.body}"]
            added += [] if after is None else [f"+{after.body}"]
            if before is not None and after is not None:
                shown, added = shown + added, []
        return shown + added if self.layers else _numbered_alike(shown + added)


def _numbered_alike(lines: Sequence[str]) -> list[str]:
    """Lines that differ in a number only as one: `+input %k_cache_{0-29} : ...`."""
    families: dict[str, list[str]] = {}
    for line in lines:
        families.setdefault(_NAME_NUMBER.sub(r"\1#", line, count=1), []).append(line)
    shown = []
    for family in families.values():
        match = _NAME_NUMBER.search(family[0])
        if len(family) == 1 or match is None:
            shown += family
            continue
        numbers = [_NAME_NUMBER.search(line) for line in family]
        joined = layer_range(found[0] for found in numbers if found)
        shown.append(family[0].replace(match[0], joined, 1))
    return shown


def hunks(before: str, after: str) -> list[Hunk]:
    """The changes, by layer; layers that changed alike are one hunk."""
    outside: list[tuple[Line | None, Line | None]] = []
    blocks: dict[str, list[tuple[Line | None, Line | None]]] = {}
    for pair in align(before, after):
        if not is_change(pair):
            continue
        left, right = (None if text is None else read_line(text) for text in pair)
        line = left or right
        assert line is not None
        place = blocks.setdefault(layer_block(line.layer), []) if line.op else outside
        place.append((left, right))
    alike: dict[object, list[str]] = {}
    for block, pairs in blocks.items():
        alike.setdefault(_signature(block, pairs), []).append(block)
    found = [Hunk(tuple(blocks[layers[0]]), tuple(layers)) for layers in alike.values()]
    return [Hunk(tuple(outside), ()), *found] if outside else found


def _signature(block: str, pairs: Sequence[tuple[Line | None, Line | None]]) -> object:
    """Equal for blocks that changed alike: values by order of appearance, own numbers open."""
    values: dict[str, str] = {}
    numbers = _DIGITS.findall(block)
    own_input = re.compile(rf"(%[A-Za-z_]\w*_){numbers[-1]}(?!\w)") if numbers else None

    def masked(line: Line | None) -> str:
        if line is None:
            return ""
        text = _REFERENCE.sub(lambda m: values.setdefault(m[0], f"%{len(values)}"), line.body)
        if own_input is None:
            return text
        text = re.sub(rf"(?<![\w.]){re.escape(block)}(?!\w)", "#", text)
        return own_input.sub(r"\1#", text)

    shape = block if own_input is None else _DIGITS.sub("#", block)
    return shape, tuple((masked(left), masked(right)) for left, right in pairs)


def collapsed_diff(
    before: str, after: str, before_name: str = "before", after_name: str = "after"
) -> str:
    """The changes from one graph text to another; "" when there are none.

    One hunk for each kind of layer, titled with the layers that changed alike; its lines are those
    of the first of them, with the numbers they have in the two texts, without history.
    """
    found = hunks(before, after)
    if not found:
        return ""
    lines = [f"--- {before_name}", f"+++ {after_name}"]
    for hunk in found:
        lines += [f"@@ {hunk.title} @@", *hunk.lines()]
    return "\n".join([*lines, ""])
