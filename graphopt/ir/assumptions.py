"""What a rewrite takes for granted of values that only a call brings.

A rewrite that is equal to the model for some inputs only must say so: it adds an Assumption to its
graph (`Graph.assume`). The graph's text has a line for each, the report prints it, a saved program
keeps it, and it is checked whenever the program runs: a value that breaks it is a RequestError,
never another result. A code that is not listed in KINDS has no check and cannot be assumed.

    assume zeros-and-ones %attention_mask  # layers.0 | model.py:12 | fuse_attention#0
    assume hidden-weighs-nothing "s + -10000.0"  # ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graphopt.errors import RequestError

Code = Literal["zeros-and-ones", "hidden-weighs-nothing"]


@dataclass(frozen=True, slots=True)
class Assumption:
    """One assumption of one graph.

    subject: the name of an input, or what the kind says. site, layer, source: the first rewrite
    that made it, and where in the model.
    """

    code: Code
    subject: str
    site: str = ""
    layer: str = ""
    source: str = ""

    def __str__(self) -> str:
        place = f" at {self.source}" if self.source else ""
        kind = KINDS[self.code]
        claim = kind.claim.format(self.subject)
        return f"{claim} ({self.site}{place}; {kind.when})"


@dataclass(frozen=True, slots=True)
class Kind:
    """claim: in words, {} for the subject. when: it is checked, in words. find: of an input's
    value, the place of an element that breaks the claim; None where the backend checks."""

    claim: str
    when: str
    find: Callable[[Tensor], tuple[int, ...] | None] | None = None


def _not_a_bit(value: Tensor) -> tuple[int, ...] | None:
    low, high = torch.aminmax(value)
    if low >= 0 and high <= 1:
        return None
    (first, *_) = ((value < 0) | (value > 1)).nonzero().tolist()
    return tuple(first)


KINDS: Mapping[str, Kind] = {
    "zeros-and-ones": Kind("{} holds zeros and ones", "checked at each call", _not_a_bit),
    "hidden-weighs-nothing": Kind(
        "a key whose score becomes {} weighs nothing beside one that is seen",
        "checked of each row's highest score when tokens are generated",
    ),
}


def check_assumptions(
    assumptions: Iterable[Assumption], names: Sequence[str], values: Sequence[Tensor]
) -> None:
    """Raise RequestError for the first input value that a rewrite assumed not to come."""
    for assumption in assumptions:
        find = KINDS[assumption.code].find
        if find is None:
            continue
        value = values[names.index(assumption.subject)]
        at = find(value)
        if at is not None:
            rewriter = assumption.site.partition("#")[0]
            raise RequestError(
                f"input {assumption.subject!r} holds {value[at].item()} at {list(at)}; the program "
                f"assumes: {assumption}; give zeros and ones, or compile with "
                f"disable=[{rewriter!r}]"
            )
