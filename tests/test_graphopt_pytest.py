"""The pytest plugin, in test suites of its own: fixture, `--accept`, summary, workers, cost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import graphopt_pytest
from graphopt.ir.opset import load_all
from graphopt.passes.registry import all_passes
from graphopt.testing import GoldenGraph

SUITE = """
import pytest
import torch
from torch import nn

from graphopt.capture import capture


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def graph():
    return capture(Norm().eval(), torch.randn(2, 16), dynamic={"x": {0: "batch"}})


def test_graph(golden_graph):
    golden_graph(graph(), "norm")


def test_rewrite(golden_graph):
    golden_graph.rewrite(graph(), "fuse_norm", "fuse_norm")


def test_replay(golden_graph):
    golden_graph.replay("fuse_norm", "fuse_norm")
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import here whatever the suite imports: pytester forgets the modules that a run in this
    process brought, and torch and graphopt cannot be imported twice."""
    load_all()
    all_passes()
    names: dict[str, Any] = {}
    exec(SUITE, names)
    golden_graph = GoldenGraph(tmp_path_factory.mktemp("golden"), accept=True)
    for test in ("test_graph", "test_rewrite", "test_replay"):
        names[test](golden_graph)


@pytest.fixture
def suite(loaded: None, pytester: pytest.Pytester) -> pytest.Pytester:
    """A project with one test file."""
    pytester.makepyfile(test_norm=SUITE)
    return pytester


def run(suite: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return suite.runpytest_inprocess("-p", "no:cacheprovider", *arguments)


def golden(suite: pytest.Pytester, name: str) -> Path:
    return suite.path / "golden" / f"{name}.gir"


def test_missing_accepted_then_passed(suite: pytest.Pytester) -> None:
    missing = run(suite)
    missing.assert_outcomes(failed=3)
    missing.stdout.fnmatch_lines(
        [
            "*GoldenError: golden/norm.gir does not exist",
            "*to accept this graph: pytest test_norm.py::test_graph --accept",
        ]
    )
    missing.stdout.no_fnmatch_line("*golden graphs written*")
    assert not (suite.path / "golden").exists()
    accepted = run(suite, "--accept")
    accepted.assert_outcomes(passed=3)
    accepted.stdout.fnmatch_lines(
        [
            "*golden graphs*",
            "written: golden/fuse_norm.gir",
            "written: golden/norm.gir",
            "2 golden graphs written, 0 unchanged",
        ]
    )
    run(suite).assert_outcomes(passed=3)
    assert sorted(path.name for path in (suite.path / "golden").iterdir()) == [
        "fuse_norm.gir",
        "norm.gir",
    ]


def test_a_change_fails_with_a_diff_until_it_is_accepted(suite: pytest.Pytester) -> None:
    run(suite, "--accept").assert_outcomes(passed=3)
    before = golden(suite, "norm").read_text()
    suite.makepyfile(test_norm=SUITE.replace("mean(-1, keepdim=True) + 1e-6", "mean(-1, True)"))
    changed = run(suite, "-k", "graph")
    changed.assert_outcomes(failed=1, deselected=2)
    changed.stdout.fnmatch_lines(
        [
            "*the graph is not what golden/norm.gir holds",
            "*--- golden/norm.gir",
            "*+++ found",
            "E *-%2 : * aten.add.Tensor(%1, 1e-06)",
            "E *+%3 : * aten.rsqrt(%1)",
            "*test_norm.py::test_graph --accept",
        ]
    )
    # Only the line of the test is shown, not how the comparison works.
    changed.stdout.no_fnmatch_line("*_settle*")
    assert golden(suite, "norm").read_text() == before
    accepted = run(suite, "--accept", "-k", "graph")
    accepted.stdout.fnmatch_lines(["1 golden graph written, 0 unchanged"])
    accepted.stdout.no_fnmatch_line("used by no test*")
    run(suite, "-k", "graph").assert_outcomes(passed=1, deselected=2)


def test_what_does_not_matter_is_left_as_it_was_written(suite: pytest.Pytester) -> None:
    run(suite, "--accept").assert_outcomes(passed=3)
    path = golden(suite, "norm")
    mine = "# by hand\n" + path.read_text().replace("%1", "%71").replace(", ", ",   ")
    path.write_text(mine)
    run(suite).assert_outcomes(passed=3)
    run(suite, "--accept").stdout.fnmatch_lines(["0 golden graphs written, 2 unchanged"])
    assert path.read_text() == mine


def test_a_file_that_does_not_parse_fails_with_its_line(suite: pytest.Pytester) -> None:
    run(suite, "--accept").assert_outcomes(passed=3)
    path = golden(suite, "norm")
    path.write_text(path.read_text().replace("aten.rsqrt", "aten.nonsense"))
    failed = run(suite)
    failed.assert_outcomes(failed=1, passed=2)
    failed.stdout.fnmatch_lines(["*golden/norm.gir: line 8 of the graph text: unknown op*"])
    run(suite, "--accept").assert_outcomes(passed=3)
    run(suite).assert_outcomes(passed=3)


def test_files_that_no_test_used_are_listed(suite: pytest.Pytester) -> None:
    run(suite, "--accept").assert_outcomes(passed=3)
    golden(suite, "norm").rename(golden(suite, "old"))
    run(suite, "--accept").stdout.fnmatch_lines(
        ["used by no test: golden/old.gir", "1 golden graph written, 1 unchanged"]
    )
    part = run(suite, "--accept", "test_norm.py::test_graph")
    part.stdout.no_fnmatch_line("used by no test*")
    run(suite).stdout.no_fnmatch_line("used by no test*")
    assert golden(suite, "old").exists()


def test_two_graphs_of_one_name_are_an_error(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        test_norm=f"{SUITE}\n\ndef test_other(golden_graph):\n"
        "    golden_graph(capture(nn.Linear(16, 4).eval(), torch.randn(2, 16)), 'norm')\n"
    )
    clash = run(suite, "--accept")
    clash.assert_outcomes(failed=1, passed=3)
    clash.stdout.fnmatch_lines(
        [
            "*golden/norm.gir is used by test_norm.py::test_graph and by test_norm.py::test_other "
            "for different graphs: give each its own name"
        ]
    )


def test_one_folder_for_a_project(suite: pytest.Pytester) -> None:
    suite.makepyprojecttoml('[tool.pytest.ini_options]\ngolden_graphs = "kept/graphs"\n')
    suite.mkpydir("inner")
    (suite.path / "test_norm.py").rename(suite.path / "inner" / "test_norm.py")
    accepted = run(suite, "--accept", "inner")
    accepted.stdout.fnmatch_lines(["written: kept/graphs/norm.gir", "2 golden graphs written*"])
    run(suite, "inner").assert_outcomes(passed=3)


@pytest.mark.slow
def test_workers(suite: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    suite.makepyfile(
        test_norm=SUITE[: SUITE.index("def test_rewrite")],
        test_other=SUITE[: SUITE.index("def test_graph")] + "def test_linear(golden_graph):\n"
        "    golden_graph(capture(nn.Linear(16, 4).eval(), torch.randn(2, 16)), 'linear')\n",
    )
    command = ("-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider")
    accepted = suite.runpytest_subprocess(*command, "--accept")
    accepted.assert_outcomes(passed=2)
    accepted.stdout.fnmatch_lines(
        [
            "written: golden/linear.gir",
            "written: golden/norm.gir",
            "2 golden graphs written, 0 unchanged",
        ]
    )
    assert sorted(path.name for path in (suite.path / "golden").iterdir()) == [
        "linear.gir",
        "norm.gir",
    ]
    other = suite.path / "test_other.py"
    other.write_text(other.read_text().replace("'linear'", "'norm'"))
    golden(suite, "norm").unlink()
    clash = suite.runpytest_subprocess(*command, "--accept")
    assert clash.ret == pytest.ExitCode.TESTS_FAILED
    clash.stdout.fnmatch_lines(["golden/norm.gir is used by test_* for different graphs: *"])


def test_it_can_be_left_out(suite: pytest.Pytester) -> None:
    left_out = run(suite, "-p", "no:graphopt")
    left_out.assert_outcomes(errors=3)
    left_out.stdout.fnmatch_lines(["*fixture 'golden_graph' not found"])


def test_the_plugin_costs_a_project_without_golden_graphs_nothing() -> None:
    code = (
        "import sys, pytest, graphopt_pytest\n"
        "print([name for name in ('torch', 'graphopt', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert graphopt_pytest.pytest_addoption.__module__ == "graphopt_pytest"
