"""One-step mutations: a program is a frozen description of choices, a mutant has one other choice.

bases       name -> description that a pass recognises
Mutation    a field of the description, the other values to give it, and the bases it fits
mutants()   every base with every fitting value, each distinct description once, in fixed order
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn


class Description(Protocol):
    """A frozen dataclass that builds its module."""

    def build(self) -> nn.Module:
        """The module; its forward takes `[3, B, S, 32]` floats and `[B, S]` zeros and ones."""
        ...


@dataclass(frozen=True, slots=True)
class Mutation:
    """`field` takes each of `values`, in the bases that `fits` accepts (all, without one)."""

    field: str
    values: Sequence[Any]
    fits: Callable[[Any], bool] | None = None


def words(text: str) -> tuple[str, ...]:
    """Values that are single words."""
    return tuple(text.split())


@dataclass(frozen=True, slots=True)
class Mutant:
    """One program. pass_name: the pass that owes it a record. name: its base and what differs."""

    pass_name: str
    name: str
    description: Any


def mutants(
    pass_name: str, bases: Mapping[str, Any], mutations: Sequence[Mutation]
) -> Iterator[Mutant]:
    """The bases themselves, then their mutants."""
    seen = set()
    for base, description in bases.items():
        seen.add(description)
        yield Mutant(pass_name, base, description)
    for base, description in bases.items():
        for mutation in mutations:
            if mutation.fits is not None and not mutation.fits(description):
                continue
            for value in mutation.values:
                changed = replace(description, **{mutation.field: value})
                if changed not in seen:
                    seen.add(changed)
                    yield Mutant(pass_name, f"{base}, {mutation.field}={value!r}", changed)
