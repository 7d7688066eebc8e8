"""`expect` and `GoldenGraph` as they are without pytest."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers.run_graph import apply
from helpers.tiny_models import CausalConvolution, tiny_llama
from torch import Tensor, fx, nn

import graphopt
from graphopt.capture import capture
from graphopt.errors import (
    ExpectationError,
    GoldenError,
    GraphoptError,
    PassError,
    RowDependenceError,
    UnsupportedError,
)
from graphopt.ir.builder import GraphBuilder
from graphopt.ir.graph import Graph
from graphopt.passes.base import Pass, Reject, Stage, Tier
from graphopt.program.program import Program
from graphopt.record.report import Report
from graphopt.testing import GoldenGraph, expect

aten = torch.ops.aten


@pytest.fixture(scope="module")
def program() -> Program:
    return graphopt.compile(tiny_llama(layers=1), backend="reference")


class Norm(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def graph_of(width: int = 16) -> Graph:
    return capture(Norm(width).eval(), torch.randn(2, width), dynamic={"x": {0: "batch"}})


def test_counts_that_are_reached(program: Program) -> None:
    expect(program, fuse_attention=1, fuse_norm=3)
    expect(program, {"graphopt.rms_norm": 3, "graphopt.paged_attention": 1}, fuse_rope=2)
    expect(program.report, fuse_norm=3)
    graph = graph_of()
    apply(graph, "fuse_norm")
    expect(graph, {"fuse_norm": 1, "graphopt.rms_norm": 1, "aten.mul.Tensor": 0})


def test_all_wrong_counts_are_in_one_message(program: Program) -> None:
    with pytest.raises(AssertionError) as error:
        expect(program, {"fuse_norm": 7, "graphopt.rope": 9, "fuse_attention": 1})
    assert isinstance(error.value, ExpectationError)
    assert str(error.value).splitlines() == [
        "expected 7 of fuse_norm, found 3; rejected 0",
        "expected 9 of graphopt.rope, found 2 in the forward graph",
    ]


def test_a_fusion_that_stops_firing_says_why() -> None:
    graph = capture(AlongRows().eval(), torch.randn(2, 16), dynamic=False)
    apply(graph, "fuse_norm")
    with pytest.raises(ExpectationError, match=r"found 0; rejected 1, first: .*\[mean-axis\]"):
        expect(graph, fuse_norm=1)


class AlongRows(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6) * self.weight


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"fuse_nrm": 1}, "did you mean 'fuse_norm'"),
        ({"graphopt.rms_nrm": 1}, "did you mean 'graphopt.rms_norm'"),
        ({"merge_qkv": 0}, "not in this run"),
        ({"fuse_norm": -1}, "an integer >= 0"),
        ({}, "no counts"),
    ],
)
def test_expectations_that_mean_nothing(
    program: Program, counts: dict[str, int], message: str
) -> None:
    with pytest.raises(PassError, match=message):
        expect(program, counts)


def test_other_misuses_of_expect(program: Program) -> None:
    with pytest.raises(PassError, match="'fuse_norm' twice"):
        expect(program, {"fuse_norm": 3}, fuse_norm=3)
    with pytest.raises(UnsupportedError, match=r"not ops such as 'graphopt\.rope'"):
        expect(Report(passes=program.report.passes), {"graphopt.rope": 2})
    with pytest.raises(UnsupportedError, match="not a str"):
        expect("program", fuse_norm=3)  # type: ignore[arg-type]


def accepted(folder: Path, graph: Graph, name: str = "norm") -> GoldenGraph:
    """A checking GoldenGraph over a folder that has this graph's rewrite by fuse_norm."""
    GoldenGraph(folder, accept=True).rewrite(graph, "fuse_norm", name)
    return GoldenGraph(folder)


def test_a_rewrite_is_compared_before_and_after(tmp_path: Path) -> None:
    graph = graph_of()
    golden_graph = accepted(tmp_path, graph)
    assert golden_graph.rewrite(graph, "fuse_norm", "norm").op_counts() == {"graphopt.rms_norm": 1}
    assert "graphopt.rms_norm" not in graph.op_counts()
    text = (tmp_path / "norm.gir").read_text()
    assert text.count("=== after fuse_norm ===\n") == 1
    (tmp_path / "norm.gir").write_text(text.replace("eps=1e-06", "eps=1e-05"))
    with pytest.raises(GoldenError, match=r"\(after fuse_norm\)(.|\n)*\+.*eps=1e-06"):
        golden_graph.rewrite(graph, "fuse_norm", "norm")
    (tmp_path / "norm.gir").write_text(text.replace("_Scalar(%x, 2)", "_Scalar(%x, 4)"))
    with pytest.raises(GoldenError, match=r"\(before\)(.|\n)*-.*\(%x, 4\)"):
        golden_graph.rewrite(graph, "fuse_norm", "norm")


def test_a_replay_needs_the_file_only(tmp_path: Path) -> None:
    golden_graph = accepted(tmp_path, graph_of())
    assert golden_graph.replay("norm", "fuse_norm").op_counts() == {"graphopt.rms_norm": 1}
    path = tmp_path / "norm.gir"
    text = path.read_text()
    path.write_text(text.replace("eps=1e-06", "eps=1e-05"))
    with pytest.raises(GoldenError, match="eps=1e-06"):
        golden_graph.replay("norm", "fuse_norm")
    path.write_text(text.replace("1e-06)", "oops)"))
    with pytest.raises(GoldenError, match=r"norm\.gir: line 7 .*not a value"):
        golden_graph.replay("norm", "fuse_norm")
    path.write_text(text)
    with pytest.raises(GoldenError, match=r"'bias', which .* does not name"):
        golden_graph.replay("norm", "fuse_norm", weights={"bias": torch.ones(16)})


def test_a_graph_written_by_hand_is_completed_and_kept(tmp_path: Path) -> None:
    text = (accepted(tmp_path, graph_of()).folder / "norm.gir").read_text()
    before, _, after = text.partition("=== after fuse_norm ===\n")
    mine = "# mine\n" + before.replace("%0", "%90")
    (tmp_path / "norm.gir").write_text(mine)
    with pytest.raises(GoldenError, match="holds one graph, the test compares a graph before and"):
        GoldenGraph(tmp_path).replay("norm", "fuse_norm")
    GoldenGraph(tmp_path, accept=True).replay("norm", "fuse_norm")
    assert (tmp_path / "norm.gir").read_text() == f"{mine}=== after fuse_norm ===\n{after}"


def test_missing_files_are_written_only_when_accepted(tmp_path: Path) -> None:
    folder = tmp_path / "golden"
    with pytest.raises(GoldenError, match=r"norm\.gir does not exist\n.*accept this graph: HOW"):
        GoldenGraph(folder, how="HOW")(graph_of(), "norm")
    with pytest.raises(GoldenError, match="write the graph before the pass into it"):
        GoldenGraph(folder, accept=True).replay("norm", "fuse_norm")
    assert not folder.exists()
    GoldenGraph(folder, accept=True)(graph_of(), "norm")
    GoldenGraph(folder)(graph_of(), "norm")
    assert [path.name for path in folder.iterdir()] == ["norm.gir"]


def test_a_file_of_another_kind_is_not_compared(tmp_path: Path) -> None:
    golden_graph = accepted(tmp_path, graph_of())
    with pytest.raises(GoldenError, match="before and after fuse_norm, the test compares one"):
        golden_graph(graph_of(), "norm")
    with pytest.raises(GoldenError, match="the test compares a graph before and after fold_pow"):
        golden_graph.rewrite(graph_of(), FoldPow, "norm")


def test_one_name_is_for_one_graph(tmp_path: Path) -> None:
    golden_graph = GoldenGraph(tmp_path, accept=True, test="first")
    golden_graph(graph_of(), "norm")
    golden_graph(graph_of(), "norm")
    with pytest.raises(GoldenError, match="used by first and by first for different graphs"):
        golden_graph(graph_of(8), "norm")
    GoldenGraph(tmp_path)(graph_of(), "norm")


@pytest.mark.parametrize("name", ["", "../norm", "a/b", ".hidden", "a b"])
def test_names_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(GoldenError, match="is no name"):
        GoldenGraph(tmp_path, accept=True)(graph_of(), name)


def test_the_graphs_of_a_program(tmp_path: Path, program: Program) -> None:
    accept, check = GoldenGraph(tmp_path, accept=True), GoldenGraph(tmp_path)
    for name, form in (("forward", None), ("served", "serving")):
        accept(program, name, form=form)
        check(program, name, form=form)
    check(program, "forward", form="forward")
    check(program.graph, "forward")
    assert "graphopt.paged_attention" in (tmp_path / "served.gir").read_text()
    with pytest.raises(UnsupportedError, match="form='serving' has no effect on a Graph"):
        check(program.graph, "forward", form="serving")
    with pytest.raises(UnsupportedError, match="form='decode'"):
        check(program, "forward", form="decode")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="not a Report"):
        check(program.report, "forward")  # type: ignore[arg-type]


def test_a_program_without_a_cache_says_why(tmp_path: Path) -> None:
    ids = torch.zeros((2, 8), dtype=torch.int64)
    served = graphopt.compile(CausalConvolution().eval(), ids, backend="reference")
    with pytest.raises(RowDependenceError, match=r"aten\.pad pads or shifts along the token axis"):
        GoldenGraph(tmp_path, accept=True)(served, "conv", form="serving")


def test_a_model_with_an_op_of_its_own_is_compared(tmp_path: Path) -> None:
    """An op that nobody defined through graphopt: the graph in hand says that it is meant."""

    @torch.library.custom_op("goldentest::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x + x

    @twice.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.goldentest.twice(x).pow(2)

    graph = capture(Own().eval(), torch.randn(2, 16), dynamic={"x": {0: "batch"}})
    GoldenGraph(tmp_path, accept=True).rewrite(graph, FoldPow, "own")
    GoldenGraph(tmp_path).rewrite(graph, FoldPow, "own")
    with pytest.raises(GoldenError, match=r"no installed plugin defines .* 'goldentest'"):
        GoldenGraph(tmp_path).replay("own", FoldPow)


class FoldPow(Pass[fx.Node]):
    """x ** 2 becomes x * x; a model of a pass that is not registered."""

    name: ClassVar[str] = "fold_pow"
    stage: ClassVar[Stage] = "fuse"

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        return graph.calls(aten.pow.Tensor_Scalar)

    def check(self, graph: Graph, node: fx.Node) -> fx.Node | Reject:
        if node.args[1] != 2:
            return Reject("not-two", "the power is not 2", node)
        return node

    def rewrite(self, builder: GraphBuilder, bound: fx.Node) -> None:
        x: Any = bound.args[0]
        bound.replace_all_uses_with(builder.emit(aten.mul.Tensor, [x, x], like=[bound]))


class FoldPowAgain(FoldPow):
    """Leaves what it looks for."""

    name: ClassVar[str] = "fold_pow_again"

    def rewrite(self, builder: GraphBuilder, bound: fx.Node) -> None:
        new = builder.emit(aten.pow.Tensor_Scalar, bound.args, like=[bound])
        bound.replace_all_uses_with(new)


class DropWeight(FoldPow):
    """Plausible and wrong: the last multiplication by the weight is left out."""

    name: ClassVar[str] = "drop_weight"

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        return [n for n in graph.calls(aten.mul.Tensor) if n.args[1].op == "get_attr"]

    def check(self, graph: Graph, node: fx.Node) -> fx.Node | Reject:
        return node

    def rewrite(self, builder: GraphBuilder, bound: fx.Node) -> None:
        bound.replace_all_uses_with(builder.emit(aten.alias.default, [bound.args[0]], like=[bound]))


class SwapRows(FoldPow):
    """Right for two rows, as in the example, and wrong for any other number of them."""

    name: ClassVar[str] = "swap_rows"

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        return graph.calls(aten.flip.default)

    def check(self, graph: Graph, node: fx.Node) -> fx.Node | Reject:
        return node

    def rewrite(self, builder: GraphBuilder, bound: fx.Node) -> None:
        rolled = builder.emit(aten.roll.default, [bound.args[0], [1], [0]], like=[bound])
        bound.replace_all_uses_with(rolled)


class Flipped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(0) * 2.0


def test_a_rewrite_that_changes_numbers_is_no_golden(tmp_path: Path) -> None:
    golden_graph = GoldenGraph(tmp_path, accept=True)
    said = r"pass 'drop_weight' changes the outputs by .*'exact' allows 0e\+00, .* of \[2, 16\]"
    with pytest.raises(GoldenError, match=said):
        golden_graph.rewrite(graph_of(), DropWeight, "norm")
    golden_graph(graph_of(), "norm")
    with pytest.raises(GoldenError, match=said):
        golden_graph.replay("norm", DropWeight)
    assert "after drop_weight" not in (tmp_path / "norm.gir").read_text()


def test_a_rewrite_that_is_right_for_one_size_only_is_no_golden(tmp_path: Path) -> None:
    graph = capture(Flipped().eval(), torch.randn(2, 4), dynamic={"x": {0: "batch"}})
    with pytest.raises(GoldenError, match=r"'swap_rows' changes the outputs .* of \[3, 4\]"):
        GoldenGraph(tmp_path, accept=True).rewrite(graph, SwapRows, "flip")


def test_rounding_is_allowed_by_the_tier(tmp_path: Path) -> None:
    class Loose(FoldPow):
        tier: ClassVar[Tier] = Tier("reassociating", 1e-6)

        def rewrite(self, builder: GraphBuilder, bound: fx.Node) -> None:
            super().rewrite(builder, bound)
            (product,) = builder.graph.calls(aten.mul.Tensor)[:1]
            near = builder.emit(aten.mul.Tensor, [product, 1 + factor], like=[product])
            product.replace_all_uses_with(near, delete_user_cb=lambda user: user is not near)

    factor = 1e-6
    GoldenGraph(tmp_path, accept=True).rewrite(graph_of(), Loose, "near")
    factor = 1e-3
    with pytest.raises(GoldenError, match="'reassociating' allows 1e-05"):
        GoldenGraph(tmp_path, accept=True).rewrite(graph_of(), Loose, "far")


def test_passes_that_are_not_registered(tmp_path: Path) -> None:
    GoldenGraph(tmp_path, accept=True).rewrite(graph_of(), FoldPow, "pow")
    GoldenGraph(tmp_path).replay("pow", FoldPow)
    assert "=== after fold_pow ===" in (tmp_path / "pow.gir").read_text()


def test_passes_that_are_not_as_they_must_be(tmp_path: Path) -> None:
    golden_graph = GoldenGraph(tmp_path, accept=True)
    with pytest.raises(GoldenError, match="fuse_rope did not fire on graph 'Norm': it has no cand"):
        golden_graph.rewrite(graph_of(), "fuse_rope", "norm")
    graph = graph_of()
    (power,) = graph.calls(aten.pow.Tensor_Scalar)
    power.args = (power.args[0], 3)
    with pytest.raises(GoldenError, match=r"did not fire .*not-two: the power is not 2"):
        golden_graph.rewrite(graph, FoldPow, "norm")
    with pytest.raises(GoldenError, match=r"fold_pow_again is not idempotent: .*rewrites \(1\)"):
        golden_graph.rewrite(graph_of(), FoldPowAgain, "norm")
    with pytest.raises(PassError, match="did you mean 'fuse_norm'"):
        golden_graph.rewrite(graph_of(), "fuse_nrm", "norm")
    with pytest.raises(PassError, match="neither the name of a pass nor a Pass class"):
        golden_graph.rewrite(graph_of(), FoldPow(), "norm")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="rewrite takes a Graph, not a str"):
        golden_graph.rewrite("graph", FoldPow, "norm")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_errors_are_both_kinds() -> None:
    for kind in (ExpectationError, GoldenError):
        assert issubclass(kind, GraphoptError)
        assert issubclass(kind, AssertionError)
