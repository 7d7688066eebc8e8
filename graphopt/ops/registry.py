"""The name under which plugins know `graphopt.ir.opset`."""

from graphopt.ir.opset import Cost, OpSpec, define, nbytes

__all__ = ["Cost", "OpSpec", "define", "nbytes"]
