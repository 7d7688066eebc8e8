"""What a setting of a model file may be: its type and its range, as data.

A table maps names to rules; `check` goes through a file's settings with it before anything is made
of them. Booleans are no numbers here, and a number that is not finite is never legal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graphopt.errors import WeightFormatError

_LONGEST = 60


@dataclass(frozen=True, slots=True)
class Rule:
    """One setting.

    low, high: of numbers, both included. lists: whether a list of such values is legal ("also"), or
    nothing else is ("only").
    """

    kind: Literal["integer", "number", "boolean", "text"]
    low: float = -math.inf
    high: float = math.inf
    lists: Literal["no", "also", "only"] = "no"

    def allows(self, value: Any) -> bool:
        """Whether `value` is of the kind and in the range."""
        if isinstance(value, list):
            return self.lists != "no" and all(map(self._allows_one, value))
        return self.lists != "only" and self._allows_one(value)

    def __str__(self) -> str:
        article = "an" if self.kind == "integer" else "a"
        one = self.kind if self.kind == "text" else f"{article} {self.kind}"
        if self.low > -math.inf and self.high < math.inf:
            one += f" from {self.low:g} to {self.high:g}"
        elif self.low > -math.inf:
            one += f" of at least {self.low:g}"
        return {"no": one, "also": f"{one}, or a list of them", "only": f"a list, each {one}"}[
            self.lists
        ]

    def _allows_one(self, value: Any) -> bool:
        if self.kind == "text":
            return isinstance(value, str)
        if self.kind == "boolean" or isinstance(value, bool):
            return self.kind == "boolean" and isinstance(value, bool)
        is_number = isinstance(value, int if self.kind == "integer" else int | float)
        return is_number and self.low <= value <= self.high and abs(value) < math.inf


SIZE = Rule("integer", 1, 2**31 - 1)
COUNT = Rule("integer", 0, 2**31 - 1)
TOKEN = Rule("integer", 0, 2**31 - 1)
TOKENS = Rule("integer", 0, 2**31 - 1, "only")
EPSILON = Rule("number", 0, 1)
POSITIVE = Rule("number", 1e-30, 1e30)
FLAG = Rule("boolean")
TEXT = Rule("text")
TEXTS = Rule("text", lists="only")


def check(path: Path, name: str, value: Any, rule: Rule) -> None:
    """Raises WeightFormatError naming the file, the setting, its value and what is legal."""
    if not rule.allows(value):
        raise WeightFormatError(f"{path} has {name}={short(value)}; it must be {rule}")


def check_all(path: Path, settings: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """`check` for every setting that has a rule; one that is null was not made."""
    for name, value in settings.items():
        if name in rules and value is not None:
            check(path, name, value, rules[name])


def short(value: Any) -> str:
    """`repr`, cut where it is long."""
    text = repr(value[:_LONGEST] if isinstance(value, (str, list)) else value)
    return text if len(text) <= _LONGEST else f"{text[:50]}..."


def one_line(error: BaseException) -> str:
    """What another library's error says."""
    return " ".join(str(error).split())
