"""Every op of the lowering tables runs natively, alone in a graph, and gives what torch gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.serving_steps import Steps
from rule_cases import CASES, Build
from serving_graph import VOCABULARY, ServingGraph

from graphopt.codegen.cpu import rules_compute, rules_shape, rules_weights
from graphopt.codegen.cpu.backend import CpuBackend
from graphopt.codegen.cpu.build import load_library
from graphopt.codegen.cpu.executable import RULES, CpuServing
from graphopt.codegen.reference import ReferenceBackend
from graphopt.ir.verify import verify


def name_of(op: Any) -> str:
    return getattr(op, "__name__", str(op)) if not hasattr(op, "_schema") else str(op)


BUILDS = [
    pytest.param(op, build, id=f"{name_of(op)}-{number}")
    for op, builds in CASES.items()
    for number, build in enumerate(builds)
]


@pytest.mark.parametrize("op", list(RULES), ids=name_of)
def test_every_rule_has_a_case(op: Any) -> None:
    assert CASES.get(op)


def test_the_tables_share_no_op() -> None:
    tables = (rules_shape.RULES, rules_compute.RULES, rules_weights.RULES)
    assert len(RULES) == sum(map(len, tables))


@pytest.mark.parametrize(("op", "build"), BUILDS)
def test_runs_natively_as_torch_does(op: Any, build: Build) -> None:
    torch.seed()
    case = ServingGraph()
    graph = case.finish(build(case))
    verify(graph)
    assert any(node.target is op for node in graph.nodes)
    notes: list[str] = []
    native = CpuBackend(load_library(), 2, notes.append).lower_serving(graph.copy(), None, None)
    assert notes == []
    assert isinstance(native, CpuServing)
    assert native.plan.host_steps == []
    reference = ReferenceBackend().lower_serving(graph.copy(), None, None)
    prompts = [torch.randint(0, VOCABULARY, (n,)).tolist() for n in (9, 1, 4)]
    results = [Steps(e, prompts).run_in_chunks(5) for e in (native, reference)]
    tolerance = 0.06 if "int8" in str(graph.fx_graph) else 2e-5
    for ours, theirs in zip(*results, strict=True):
        scale = float(theirs.abs().max()) + 1e-6
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=tolerance, atol=tolerance)
