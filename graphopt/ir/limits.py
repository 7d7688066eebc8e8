"""Limits: the conditions on symbolic sizes under which a graph is the model.

A capture follows one road through the model: every comparison of a size that the road depends on,
and every size that an op needs, becomes a `Limit`. In the graph text it is a line:

    limit sequence <= 24 branch  # model.py:12
    limit sequence % 8 == 0 op  # model.py:40
    limit batch*sequence <= 99 branch  # model.py:41

`size` is a name of a symbolic size or an expression of names, with + - * // ** and the functions
Mod, Max and Min.
"""

from __future__ import annotations

import ast
import functools
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Relation = Literal["<=", ">=", "==", "!=", "%"]
Cause = Literal["branch", "op"]

_LINE = re.compile(
    r"limit\s+(?P<size>\S(?:[^<>=!%]*[^<>=!%\s])?)\s*(?P<relation><=|>=|==|!=|%)\s*(?P<number>-?\d+)(?:\s*==\s*0)?"
    r"\s+(?P<cause>branch|op)(?:\s*#(?P<source>.*))?"
)
_HOLDS: dict[str, Callable[[int, int], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "%": lambda size, number: size % number == 0,
}
_LONGEST, _LARGEST, _LARGEST_EXPONENT = 20_000, 2**1024, 64


def _power(base: int, exponent: int) -> int:
    if not 0 <= exponent <= _LARGEST_EXPONENT:
        raise ValueError(f"{exponent} is no exponent of a size: 0 to {_LARGEST_EXPONENT}")
    return int(base**exponent)


_OPERATORS: dict[type[ast.AST], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: _power,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {"Mod": operator.mod, "Max": max, "Min": min}


@dataclass(frozen=True, slots=True)
class Limit:
    """One condition: `size relation number`; "%" means that the size is a multiple of the number.

    cause: "branch": the model goes another way where it does not hold; "op": an op of the model
    needs it. source: the line of the model that caused it, "" where that is not known.
    """

    size: str
    relation: Relation
    number: int
    cause: Cause = "op"
    source: str = ""

    def __str__(self) -> str:
        return f"{self.size} {self.relation} {self.number}" + " == 0" * (self.relation == "%")

    @property
    def names(self) -> frozenset[str]:
        """The symbolic sizes in it."""
        tree = _parsed(self.size)
        functions = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        return frozenset(
            node.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Name) and id(node) not in functions
        )

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """True when `sizes`, which has every name of it, fulfils it."""
        try:
            found = _value(_parsed(self.size), sizes)
        except (ArithmeticError, ValueError):
            return False
        return _HOLDS[self.relation](found, self.number)

    def told(self) -> str:
        """The limit with its cause and line, for reports: `sequence <= 24 (branch at m.py:12)`."""
        place = f" at {self.source}" if self.source else ""
        what = "the model branches on it" if self.cause == "branch" else "an op needs it"
        return f"{self} ({what}{place})"

    def reason(self) -> str:
        """Why a size that does not fulfil it is refused."""
        place = f" at {self.source}" if self.source else ""
        if self.cause == "branch":
            return (
                f"this program was captured for {self}, since the model branches on it{place}: "
                "compile another one, with an example of the other kind"
            )
        word = {"<=": "at most ", ">=": "at least "}.get(self.relation)
        if word is None or self.size not in self.names:
            return f"the model takes {self}{place}"
        return f"the model takes {word}{self.number}{place}"

    def narrows(self) -> str:
        """The warning that the program takes less than a user may expect."""
        place = f" at {self.source}" if self.source else ""
        if self.cause == "op" and self.relation == "==":
            return (
                f"the program is for {self} only, since an op gives as much for the example{place}"
            )
        if self.cause == "op":
            return f"the program takes {self}, less than the model's configuration says{place}"
        return (
            f"the program is for {self} only: the model branches on it{place}, and the example "
            "took this road; compile another program for the other one"
        )

    def line(self, has_source: bool = True) -> str:
        """The line of the graph text."""
        comment = f"  # {self.source}" if self.source and has_source else ""
        return f"limit {self} {self.cause}{comment}"


def read_limit(line: str) -> Limit | None:
    """Back from `Limit.line`; None for a line that is none."""
    match = _LINE.fullmatch(line.strip()) if len(line) <= 2 * _LONGEST else None
    if match is None or not is_size(match["size"]):
        return None
    if match["relation"] == "%" and int(match["number"]) < 1:
        return None
    source = (match["source"] or "").strip()
    relation: Any = match["relation"]
    cause: Any = match["cause"]
    return Limit(match["size"], relation, int(match["number"]), cause, source)


def is_size(text: str) -> bool:
    """True for an expression that a limit can be about."""
    try:
        _value(_parsed(text), _Anything())
    except (SyntaxError, KeyError, ValueError, TypeError, RecursionError, MemoryError):
        return False
    except ArithmeticError:
        pass
    return True


def lowest(limits: Iterable[Limit], name: str) -> Limit | None:
    """The limit that bounds the size called `name` from below."""
    return _tightest(limits, name, ">=", max)


def highest(limits: Iterable[Limit], name: str) -> Limit | None:
    """The limit that bounds the size called `name` from above."""
    return _tightest(limits, name, "<=", min)


def fitting_size(limits: Iterable[Limit], name: str, wanted: int) -> int:
    """A size that all limits on `name` alone allow, `wanted` if possible, else the nearest above
    or below it."""
    own = [limit for limit in limits if limit.names == {name}]
    for distance in range(4096):
        for size in (wanted + distance, wanted - distance):
            if size > 0 and all(limit.holds({name: size}) for limit in own):
                return size
    return wanted


def _tightest(
    limits: Iterable[Limit], name: str, relation: Relation, choose: Callable[..., Limit]
) -> Limit | None:
    found = [limit for limit in limits if limit.size == name and limit.relation == relation]
    return choose(found, key=lambda limit: limit.number) if found else None


class _Anything(Mapping[str, int]):
    """Every name is 1."""

    def __getitem__(self, name: str) -> int:
        return 1

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> ast.expr:
    if len(text) > _LONGEST:
        raise ValueError(f"a size of {len(text):,} characters is none")
    return ast.parse(text, mode="eval").body


def _value(tree: ast.expr, sizes: Mapping[str, int]) -> int:
    found = _number(tree, sizes)
    if abs(found) > _LARGEST:
        raise OverflowError("a size beyond all memory")
    return found


def _number(tree: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(tree, ast.Constant) and type(tree.value) is int:
        return tree.value
    if isinstance(tree, ast.Name):
        return sizes[tree.id]
    if isinstance(tree, ast.BinOp) and type(tree.op) in _OPERATORS:
        return _OPERATORS[type(tree.op)](_value(tree.left, sizes), _value(tree.right, sizes))
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -_value(tree.operand, sizes)
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.keywords:
        function = _FUNCTIONS[tree.func.id]
        return function(*(_value(argument, sizes) for argument in tree.args))
    raise ValueError(f"{ast.unparse(tree)!r} is no part of a size")
