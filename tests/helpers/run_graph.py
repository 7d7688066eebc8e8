"""Runs graphs in tests: by the reference backend, before and after passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.codegen.reference import ReferenceBackend
from graphopt.ir.graph import Graph
from graphopt.ir.text.parser import first_difference
from graphopt.passes.manager import PassManager
from graphopt.record.report import Report

CLEANUP = (
    "drop_asserts",
    "remove_noops",
    "canonicalize_views",
    "common_subexpressions",
    "fold_constants",
    "dead_code",
)
FUSE = ("fuse_attention", "fuse_norm", "fuse_rope", "fuse_mlp")


def run(graph: Graph, *inputs: Tensor) -> Tensor:
    """First output of the graph, by the ops' definitions."""
    return ReferenceBackend().lower(graph)(*inputs)[0]


def apply(graph: Graph, *passes: str) -> Report:
    """Run passes in place."""
    report = Report()
    PassManager(passes).run(graph, report)
    return report


def assert_idempotent(graph: Graph, passes: Sequence[str]) -> None:
    """A second run of `passes` applies nothing and changes nothing."""
    before = graph.copy()
    report = apply(graph, *passes)
    assert {record.name: len(record.sites) for record in report.passes if record.sites} == {}
    assert first_difference(before, graph) is None


def assert_close(actual: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """Largest error relative to the largest expected value."""
    assert torch.isfinite(actual).all()
    error = (actual.double() - expected.double()).abs().max()
    assert error <= relative * expected.double().abs().max().clamp_min(1e-6), error
