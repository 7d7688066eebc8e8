"""The terminal that commands print to, and how they say that something went wrong."""

from __future__ import annotations

from rich.console import Console, ConsoleDimensions
from rich.text import Text


class Terminal(Console):
    """A terminal that says it has no columns (COLUMNS=0) gets 80, rather than nothing."""

    @property
    def size(self) -> ConsoleDimensions:
        found = super().size
        return found if found.width > 0 else ConsoleDimensions(80, found.height)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size


console = Terminal()


def complain(message: str) -> None:
    """One line on the error stream."""
    text = Text.assemble(("error:", "red"), " ", message)
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
