"""Differences of two graph texts, by value: what a pass did, without what it left alone.

Values keep their numbers through passes, so a line of the text before belongs to the line after
with the same number. Lines that differ in their history only are the same. `align` puts the lines
side by side; `collapsed_diff` shows the changed ones, those of identical layers once.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from graphopt.record.layers import layer_block, layer_numbers, layer_range, layer_shape

Pair = tuple[str | None, str | None]

_REFERENCE = re.compile(r"%\w+(?![\w#])")
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


def hunks(before: str, after: str, shows: Callable[[str], bool] | None = None) -> list[Hunk]:
    """The changes, by layer; layers that changed alike are one hunk.

    shows: leaves changes out of which neither line is wanted.
    """
    outside: list[tuple[Line | None, Line | None]] = []
    blocks: dict[str, list[tuple[Line | None, Line | None]]] = {}
    for pair in align(before, after):
        if not is_change(pair):
            continue
        if shows is not None and not any(text is not None and shows(text) for text in pair):
            continue
        left, right = (None if text is None else read_line(text) for text in pair)
        line = left or right
        assert line is not None
        place = blocks.setdefault(layer_block(line.layer), []) if line.op else outside
        place.append((left, right))
    texts = (_Values(before), _Values(after))
    alike: dict[object, list[str]] = {}
    for block, pairs in blocks.items():
        alike.setdefault(_signature(block, pairs, texts), []).append(block)
    found = [Hunk(tuple(blocks[layers[0]]), tuple(layers)) for layers in alike.values()]
    return [Hunk(tuple(outside), ()), *found] if outside else found


class _Values:
    """Where the values of one text live, so that references of two layers can be compared."""

    def __init__(self, text: str) -> None:
        self._place: dict[str, tuple[str, str]] = {}
        self._last: dict[str, str] = {}
        alike: Counter[str] = Counter()
        self._readers: dict[str, set[str]] = defaultdict(set)
        self._first: dict[str, tuple[int, ...]] = {}
        for line in map(read_line, text.splitlines()):
            if not line.op:
                continue
            block = layer_block(line.layer)
            # By kind, so that an op more in one layer does not shift all others.
            kind = f"{line.layer.removeprefix(block)} {line.op}"
            self._place[line.key] = (block, f"{kind} {alike[block + kind]}")
            alike[block + kind] += 1
            self._last[block] = line.key
            for name in _REFERENCE.findall(line.body.partition(" = ")[2]):
                self._readers[name].add(block)
            shape, own = layer_shape(block), layer_numbers(block)
            self._first[shape] = min(own, self._first.get(shape, own))

    def seen_from(self, name: str, block: str) -> str:
        """A value as a line of `block` sees it: equal for values in the same place of identical
        layers.

        What a layer is given, the last value of the layer before or whatever only the first layer
        reads, is one name for all.
        """
        home, place = self._place.get(name, ("", ""))
        if home == block:
            return f"%own[{place}]"
        shape, own, other = layer_shape(block), layer_numbers(block), layer_numbers(home)
        if layer_shape(home) == shape and own:
            steps = [a - b for a, b in zip(other, own, strict=True)]
            if name == self._last[home] and steps[-1] == -1 and not any(steps[:-1]):
                return "%given"
            if len(self._readers[name] - {home}) > 1:
                # Shared by several layers: the same value for all of them.
                return name
            return f"%{steps}[{place}]"
        alike = {layer_numbers(b) for b in self._readers[name] if layer_shape(b) == shape}
        return "%given" if alike == {self._first.get(shape)} and own else name


def _signature(
    block: str,
    pairs: Sequence[tuple[Line | None, Line | None]],
    texts: tuple[_Values, _Values],
) -> object:
    """Equal for blocks that changed alike: references by place, own numbers open."""
    numbers = layer_numbers(block)
    own_input = re.compile(rf"(%[A-Za-z_]\w*_){numbers[-1]}(?!\w)") if numbers else None

    def masked(line: Line | None, values: _Values) -> str:
        if line is None:
            return ""
        text = line.body
        if own_input is not None:
            text = re.sub(rf"(?<![\w.]){re.escape(block)}(?!\w)", "#", text)
            text = own_input.sub(r"\1#", text)
        return _REFERENCE.sub(lambda match: values.seen_from(match[0], block), text)

    lines = [(masked(left, texts[0]), masked(right, texts[1])) for left, right in pairs]
    return layer_shape(block), tuple(lines)


def collapsed_diff(
    before: str,
    after: str,
    before_name: str = "before",
    after_name: str = "after",
    shows: Callable[[str], bool] | None = None,
) -> str:
    """The changes from one graph text to another; "" when there are none.

    One hunk for each kind of layer, titled with the layers that changed alike; its lines are those
    of the first of them, with the numbers they have in the two texts, without history.
    shows: leaves changes out of which neither line is wanted.
    """
    found = hunks(before, after, shows)
    if not found:
        return ""
    lines = [f"--- {before_name}", f"+++ {after_name}"]
    for hunk in found:
        lines += [f"@@ {hunk.title} @@", *hunk.lines()]
    return "\n".join([*lines, ""])
