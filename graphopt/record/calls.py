"""Which kernel runs each value of a graph, as a backend planned it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KernelCall:
    """What runs a value of the graph.

    value: "%12". kernel: of the backend, or the op that torch runs. is_native: False for torch.
    """

    value: str
    kernel: str
    is_native: bool
