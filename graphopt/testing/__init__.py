"""For the tests of programs and passes: `expect`, and golden files with `GoldenGraph`."""

from graphopt.testing.assertions import ExpectationError, GoldenError, GoldenGraph, Use, expect

__all__ = ["ExpectationError", "GoldenError", "GoldenGraph", "Use", "expect"]
