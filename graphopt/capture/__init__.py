"""Capture: nn.Module, ExportedProgram or loaded model -> `Graph`."""

from graphopt.capture.capture import capture
from graphopt.capture.source import ModelSource
from graphopt.ir.weights import PackedWeight

__all__ = ["ModelSource", "PackedWeight", "capture"]
