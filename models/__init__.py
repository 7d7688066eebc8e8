"""Models to start from: `load(ref)` for real weights, and a small reference set of plain modules."""

from graphopt.models.builtin import BUILTINS
from graphopt.models.load import load

__all__ = ["BUILTINS", "load"]
