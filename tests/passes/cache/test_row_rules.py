"""Ops that keep token rows apart are served and give the model's numbers; the same kinds of op
along the token axis are refused by name."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from helpers.serving_steps import Steps
from row_ops import KEEPS, MIXES, Body
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.codegen.backend import Backend
from graphopt.codegen.cpu.backend import CpuBackend
from graphopt.codegen.cpu.build import load_library
from graphopt.codegen.reference import ReferenceBackend
from graphopt.ir.clean import remove_dead
from graphopt.ir.graph import Graph
from graphopt.passes.analysis.rows.rules import RULES
from graphopt.passes.manager import PassManager
from graphopt.record.report import Report

WIDTH = 8


class Branches(nn.Module):
    """Every body on its own, on one embedding: values as wide as there are token ids."""

    def __init__(self, bodies: list[Body]) -> None:
        super().__init__()
        self.bodies = bodies
        self.embed = nn.Embedding(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(64, WIDTH))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(input_ids) * 1.5
        return tuple(body(x, self.table, input_ids) for body in self.bodies)


@functools.cache
def branches(kind: str) -> tuple[Branches, Graph]:
    torch.manual_seed(0)
    bodies = list(KEEPS.values()) if kind == "keeps" else [body for body, _ in MIXES.values()]
    model = Branches(bodies).eval()
    return model, capture(model, torch.randint(0, WIDTH, (3, 9)))


def branch(kind: str, number: int) -> tuple[Graph, Report]:
    """One body's graph, after insert_kv_cache."""
    graph = branches(kind)[1].copy()
    wanted = graph.output_nodes[number]
    graph.fx_graph.output_node().args = ((wanted,),)
    remove_dead(graph)
    passes = ["remove_noops", "canonicalize_views", "insert_kv_cache"]
    PassManager(passes).run(graph, report := Report())
    return graph, report


@functools.cache
def cpu() -> Backend:
    return CpuBackend(load_library(), threads=1)


@pytest.mark.parametrize("name", KEEPS)
def test_rows_that_stay_apart_are_served(name: str) -> None:
    number = list(KEEPS).index(name)
    graph, report = branch("keeps", number)
    assert graph.dialect == "serving", report.rejections("insert_kv_cache")
    model = branches("keeps")[0]
    prompts = [[random.randrange(WIDTH) for _ in range(n)] for n in (9, 1, 14)]
    with torch.no_grad():
        expected = [model(torch.tensor([prompt]))[number][0] for prompt in prompts]
    for backend in (ReferenceBackend(), cpu()):
        executable = backend.lower_serving(graph.copy(), None, None)
        found = Steps(executable, prompts).run_in_chunks(3)
        for rows, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(rows, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MIXES)
def test_rows_that_mix_are_refused(name: str) -> None:
    graph, report = branch("mixes", list(MIXES).index(name))
    assert graph.dialect == "captured"
    (rejection,) = report.rejections("insert_kv_cache")
    assert rejection.code in ("rows-mixed", "batch-mixed", "rows-unknown")
    assert MIXES[name][1] in rejection.text
    assert rejection.source.startswith("test_row_rules.py:")


def test_no_rule_is_for_an_op_that_draws_or_writes() -> None:
    """Apart from the kinds of dropout, which their rule refuses while training."""
    for target in RULES:
        if isinstance(target, torch._ops.OpOverload) and "drop" not in str(target):
            is_random = torch.Tag.nondeterministic_seeded in target.tags
            assert not is_random or target is torch.ops.aten.rrelu.default, target
            marks = [argument.alias_info for argument in target._schema.arguments]
            assert not any(mark is not None and mark.is_write for mark in marks), target
