"""explain: the record of the one run, grouped; what it says when there is none."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers.run_graph import apply
from helpers.tiny_models import CausalConvolution, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, fx, nn

import graphopt
from graphopt.errors import NoRecordError, PassError, ProgramFormatError, UnsupportedError
from graphopt.inspect.rows import Explanation, PassRun
from graphopt.ir.builder import GraphBuilder, replace
from graphopt.ir.graph import Graph, value_name
from graphopt.ir.text.parser import parse_graph
from graphopt.ir.text.printer import print_graph
from graphopt.passes import registry
from graphopt.passes.base import Pass, Reject, Stage, run_pass
from graphopt.passes.manager import PassManager
from graphopt.program.program import Program
from graphopt.program.save import load_report
from graphopt.record.layers import layer_range, layer_shape
from graphopt.record.report import Absorbed, Rejection, Report, Site

neg = torch.ops.aten.neg.default


class Router(nn.Module):
    """A softmax that is no attention, and a gated activation."""

    def __init__(self) -> None:
        super().__init__()
        self.choice, self.up = nn.Linear(8, 4), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.choice(x), -1)
        gated = nn.functional.silu(x) * self.up(x)
        return gated * weights.sum(-1, keepdim=True)


class Mixed(nn.Module):
    """Three routers, and an activation that is not gated."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Router() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return nn.functional.silu(x)


class Negations(nn.Module):
    """A chain of `depth` negations."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.depth):
            x = torch.neg(x)
        return x


class FoldPairs(Pass[fx.Node]):
    """-(-x) is x, outermost pair first: the inner negation of a pair is absorbed."""

    name: ClassVar[str] = "fold_pairs"
    stage: ClassVar[Stage] = "cleanup"

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        # Twice each: a candidate is one however often it is named.
        return [node for node in reversed(graph.calls(neg)) for _ in range(2)]

    def check(self, graph: Graph, node: fx.Node) -> fx.Node | Reject:
        inner = node.args[0]
        assert isinstance(inner, fx.Node)
        if inner.target is not neg:
            return Reject("single", "the operand is not negated", node, "negate twice")
        return node

    def rewrite(self, builder: GraphBuilder, bound: fx.Node) -> None:
        inner = bound.args[0]
        assert isinstance(inner, fx.Node)
        assert isinstance(inner.args[0], fx.Node)
        replace(builder.graph, bound, inner.args[0])
        builder.graph.fx_graph.erase_node(inner)


class Rebuild(Pass[fx.Node]):
    """Puts a new FX graph in place of the old one, as insert_kv_cache does."""

    name: ClassVar[str] = "rebuild"
    stage: ClassVar[Stage] = "lower"

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        return graph.calls(neg)

    def check(self, graph: Graph, node: fx.Node) -> fx.Node:
        return node

    def rewrite(self, builder: GraphBuilder, bound: fx.Node) -> None:
        builder.graph.gm = builder.graph.copy().gm


def test_a_pass_that_rebuilds_the_graph_absorbs_the_rest() -> None:
    graph = graphopt.capture(Negations(3).eval(), torch.randn(2, 3))
    names = [value_name(node) for node in graph.calls(neg)]
    candidates = run_pass(Rebuild(), graph)
    assert [c.node for c in candidates] == names
    assert [c.result for c in candidates[1:]] == [Absorbed("rebuild#0")] * 2
    site = candidates[0].result
    assert isinstance(site, Site)
    assert (site.replaced, site.made) == ((), ())
    assert not graph.gm._erase_node_hooks


@pytest.fixture
def fold_pairs(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(registry, "_REGISTRY", {**registry.all_passes(), "fold_pairs": FoldPairs})
    return "fold_pairs"


@pytest.fixture(scope="module")
def mixed() -> Graph:
    return graphopt.capture(Mixed().eval(), torch.randn(2, 8))


@pytest.fixture(scope="module")
def program() -> Program:
    return graphopt.compile(tiny_llama(layers=3), backend="reference")


def printed(explanation: Explanation, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(explanation.table())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_identical_layers_are_one_row(program: Program) -> None:
    explanation = graphopt.explain(program, "fuse_attention")
    (row,) = explanation.rows
    assert explanation.summary == "3 of 3 fused"
    assert (row.outcome, row.code, row.count) == ("applied", "", "3/3")
    assert row.layer == "model.layers.{0-2}.self_attn"
    assert row.source.startswith("modeling_llama.py:")
    assert [m.site for m in row.members] == [f"fuse_attention#{i}" for i in range(3)]
    assert [m.layer for m in row.members] == [f"model.layers.{i}.self_attn" for i in range(3)]


def test_what_a_rewrite_replaced(program: Program) -> None:
    rows = graphopt.explain(program, "fuse_norm").rows
    assert [row.layer for row in rows] == [
        "model.layers.{0-2}.input_layernorm",
        "model.layers.{0-2}.post_attention_layernorm",
        "model.norm",
    ]
    for row in rows:
        assert row.made == ("graphopt.rms_norm",)
        assert {"aten.rsqrt", "aten.mean.dim"} <= set(row.replaced)
        assert row.change.endswith("-> graphopt.rms_norm")


def test_node_counts_follow_from_the_changes(program: Program) -> None:
    """Nodes before - replaced + made = nodes after, for every pass but the one that rebuilds."""
    for record in program.report.passes:
        if record.stage == "cache":
            continue
        removed = sum(len(site.replaced) for site in record.sites)
        added = sum(len(site.made) for site in record.sites)
        assert record.nodes_before - removed + added == record.nodes_after, record.name


def test_fused_and_rejected(mixed: Graph) -> None:
    graph = mixed.copy()
    report = apply(graph, "fuse_attention", "fuse_mlp")
    attention = graphopt.explain(report, "fuse_attention")
    (row,) = attention.rows
    assert attention.summary == "0 of 3 fused, 3 rejected"
    assert (row.outcome, row.count, row.layer) == ("rejected", "3/3", "layers.{0-2}")
    rejection = report.rejections("fuse_attention")[0]
    assert (row.code, row.text, row.mend) == (rejection.code, rejection.text, rejection.mend)
    assert row.source.startswith("test_explain.py:")
    assert row.op == "aten.softmax.int"
    mlp = graphopt.explain(report, "fuse_mlp")
    assert mlp.summary == "3 of 4 fused, 1 rejected"
    assert [(row.outcome, row.count) for row in mlp.rows] == [
        ("applied", "3/3"),
        ("rejected", "1/1"),
    ]
    assert mlp.rows[1].code == "not-gated"
    assert "not-gated: " in str(mlp)
    assert "3 of 4 fused, 1 rejected" in printed(mlp)
    assert "layers.{0-2}" in printed(mlp)


def test_every_candidate_appears_once(program: Program, mixed: Graph) -> None:
    graph = mixed.copy()
    names = [name for name, cls in registry.all_passes().items() if cls.stage != "cache"]
    for report in (program.report, apply(graph, *names)):
        explanation = graphopt.explain(report)
        for record, run in zip(report.passes, explanation.runs, strict=True):
            assert record.name == run.name
            members = [m for row in run.rows for m in row.members]
            assert sorted(m.node for m in members) == sorted(c.node for c in record.candidates)
            layers = {c.node: c.layer for c in record.candidates if c.layer}
            assert all(m.layer == layers.get(m.node, m.layer) for m in members)
            assert run.count("applied") == len(record.sites)
            assert run.count("rejected") + run.count("limited") == len(record.rejections)
            assert all(0 < len(row.members) <= row.total for row in run.rows)


def test_one_pass_seen_node_by_node(fold_pairs: str) -> None:
    """Five negations: two pairs fold, their inner ones are absorbed, the innermost is left."""
    graph = graphopt.capture(Negations(5).eval(), torch.randn(2, 3))
    names = [value_name(node) for node in graph.calls(neg)]
    report = apply(graph, fold_pairs)
    (record,) = report.passes
    assert [c.node for c in record.candidates] == names[::-1]
    kinds = [type(c.result) for c in record.candidates]
    assert kinds == [Site, Absorbed, Site, Absorbed, Rejection]
    assert [c.result.site for c in record.candidates if isinstance(c.result, Absorbed)] == [
        "fold_pairs#0",
        "fold_pairs#1",
    ]
    assert record.sites[0].replaced == ("aten.neg", "aten.neg")
    assert record.sites[0].made == ()
    explanation = graphopt.explain(report, fold_pairs)
    assert explanation.summary == "2 of 3 applied, 1 rejected; 2 more absorbed"
    assert {row.outcome for row in explanation.rows} == {"applied", "absorbed", "rejected"}
    assert "to match: negate twice" in str(explanation)
    assert "2 aten.neg -> nothing" in str(explanation)


@settings(max_examples=40, deadline=None)
@given(depth=st.integers(0, 9), limit=st.integers(0, 4) | st.none())
def test_any_chain_and_limit(depth: int, limit: int | None) -> None:
    builder_graph = graphopt.capture(Negations(max(depth, 1)).eval(), torch.randn(2, 3))
    names = [value_name(node) for node in builder_graph.calls(neg)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_REGISTRY", {**registry.all_passes(), "fold_pairs": FoldPairs})
        report = Report()
        limits = {} if limit is None else {"fold_pairs": limit}
        PassManager(["fold_pairs"], limits=limits).run(builder_graph, report)
        (run,) = graphopt.explain(report, "fold_pairs").runs
    pairs = len(names) // 2
    applied = pairs if limit is None else min(limit, pairs)
    left = len(names) - 2 * applied
    assert run.count("applied") == run.count("absorbed") == applied
    # What is left: all but the innermost have a negated operand.
    assert run.count("limited") == (max(left - 1, 0) if limit is not None else 0)
    assert run.count("rejected") == (1 if left else 0)
    shown = [m.node for row in run.rows for m in row.members]
    assert sorted(shown) == sorted(names)


def test_limits_are_shown_as_such() -> None:
    graph = graphopt.capture(tiny_llama(layers=3))
    report = Report()
    PassManager(["fuse_norm"], limits={"fuse_norm": 2}).run(graph, report)
    explanation = graphopt.explain(report, "fuse_norm")
    assert explanation.summary == "2 of 7 fused, 5 limited"
    (run,) = explanation.runs
    assert run.limit == 2
    limited = [row for row in run.rows if row.outcome == "limited"]
    assert [row.count for row in limited] == ["2/3", "2/3", "1/1"]
    assert limited[0].layer == "model.layers.{1-2}.input_layernorm"
    assert limited[0].code == "limit"
    assert "limits={'fuse_norm': 2}" in limited[0].reason
    assert report.sites("fuse_norm") == 2


def test_beyond_the_limit_reasons_stay_reasons(mixed: Graph) -> None:
    report = Report()
    PassManager(["fuse_mlp"], limits={"fuse_mlp": 0}).run(mixed.copy(), report)
    assert graphopt.explain(report).summary == "0 of 4 fused, 1 rejected, 3 limited"


def test_disabled_passes_are_named() -> None:
    program = graphopt.compile(
        CausalConvolution().eval(),
        torch.ones((2, 8), dtype=torch.int64),
        backend="reference",
        disable=["fuse_mlp"],
    )
    explanation = graphopt.explain(program, "fuse_mlp")
    assert (explanation.summary, explanation.rows) == ("disabled, did not run", ())
    assert "fuse_mlp: disabled, did not run" in str(graphopt.explain(program))
    (row,) = graphopt.explain(program, "insert_kv_cache").rows
    assert program.refusal is not None
    assert (row.code, row.text) == (program.refusal.code, program.refusal.text)
    assert (row.layer, row.source) == (program.refusal.layer, program.refusal.source)
    assert program.refusal.node in {member.blocker for member in row.members}


def test_runs_are_told_apart(mixed: Graph) -> None:
    graph, report = mixed.copy(), Report()
    for _ in range(2):
        PassManager(["fuse_mlp"]).run(graph, report)
    explanation = graphopt.explain(report, "fuse_mlp")
    assert [run.run for run in explanation.runs] == [1, 2]
    assert explanation.summary == (
        "fuse_mlp (run 1): 3 of 4 fused, 1 rejected\nfuse_mlp (run 2): 0 of 1 fused, 1 rejected"
    )
    assert "fuse_mlp (run 2)" in printed(explanation)
    # The graph holds the same record.
    assert graphopt.explain(graph, "fuse_mlp") == explanation


def test_several_passes_in_the_order_asked(program: Program) -> None:
    explanation = graphopt.explain(program, "fuse_rope", "fuse_attention", "fuse_rope")
    assert [run.name for run in explanation.runs] == ["fuse_rope", "fuse_attention"]
    everything = graphopt.explain(program)
    assert [run.name for run in everything.runs] == [r.name for r in program.report.passes]


def test_a_graph_carries_its_record_and_copies_keep_it(program: Program, mixed: Graph) -> None:
    assert program.serving is not None
    forward = [r.name for r in program.graph.records]
    assert [r.name for r in program.serving.records] == [*forward, "insert_kv_cache"]
    graph = mixed.copy()
    apply(graph, "fuse_mlp")
    copy = graph.copy()
    apply(graph, "dead_code")
    assert [r.name for r in copy.records] == ["fuse_mlp"]
    assert not mixed.records


def test_a_graph_without_a_record(mixed: Graph, program: Program) -> None:
    with pytest.raises(NoRecordError, match=r"no record.*dry_run=True"):
        graphopt.explain(mixed, "fuse_mlp")
    parsed = parse_graph(print_graph(program.graph), dict(program.graph.weights))
    with pytest.raises(NoRecordError, match="no record"):
        graphopt.explain(parsed)
    with pytest.raises(NoRecordError, match="no record"):
        graphopt.explain(Report())


def test_a_dry_run_changes_nothing(mixed: Graph) -> None:
    before = print_graph(mixed)
    explanation = graphopt.explain(mixed, "fuse_mlp", dry_run=True)
    assert explanation.summary == "3 of 4 would be fused, 1 rejected"
    assert [row.outcome for row in explanation.rows] == ["matches", "rejected"]
    assert explanation.rows[0].reason == ""
    assert all(run.dry for run in explanation.runs)
    assert print_graph(mixed) == before
    assert not mixed.records
    everything = graphopt.explain(mixed, dry_run=True)
    assert {run.name for run in everything.runs} == set(registry.all_passes())


def test_wrong_questions(program: Program, mixed: Graph) -> None:
    with pytest.raises(
        PassError, match=r"'fuse_atention', did you mean 'fuse_attention'.*ran: "
    ) as e:
        graphopt.explain(program, "fuse_atention")
    assert "did not run: " in str(e.value)
    with pytest.raises(NoRecordError, match=r"'quantize_activations' did not run on program"):
        graphopt.explain(program, "quantize_activations")
    with pytest.raises(PassError, match="unknown pass 'nothing_like_it';"):
        graphopt.explain(program, "nothing_like_it")
    with pytest.raises(PassError, match="did you mean 'fuse_mlp'"):
        graphopt.explain(mixed, "fuse_mpl", dry_run=True)
    with pytest.raises(UnsupportedError, match="Program, a Graph or a Report, not a str"):
        graphopt.explain("smollm2-135m", "fuse_mlp")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="takes a Graph, not a Program"):
        graphopt.explain(program, "fuse_mlp", dry_run=True)


def test_json_goes_round(program: Program, mixed: Graph) -> None:
    graph = mixed.copy()
    for explanation in (graphopt.explain(program), graphopt.explain(apply(graph, "fuse_mlp"))):
        text = explanation.to_json()
        assert json.loads(text)["runs"][-1]["summary"] == explanation.runs[-1].summary
        assert Explanation.from_dict(json.loads(text)) == explanation


def test_a_saved_program_keeps_its_report(program: Program, tmp_path: Path) -> None:
    program.save(tmp_path / "p")
    loaded = graphopt.load_program(tmp_path / "p")
    assert graphopt.explain(loaded) == graphopt.explain(program)
    assert graphopt.explain(load_report(tmp_path / "p")) == graphopt.explain(program)
    assert loaded.report.passes == program.report.passes
    manifest = json.loads((tmp_path / "p" / "manifest.json").read_text())
    assert "report.json" in manifest["files"]
    assert load_file(tmp_path / "p" / "weights.safetensors")
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / "report.json").read_text() == (
        tmp_path / "p" / "report.json"
    ).read_text()


def test_programs_saved_before_and_damaged_reports(program: Program, tmp_path: Path) -> None:
    program.save(tmp_path / "p")
    file, manifest = tmp_path / "p" / "report.json", tmp_path / "p" / "manifest.json"
    file.write_text("{}")
    with pytest.raises(ProgramFormatError, match=r"report\.json was altered"):
        load_report(tmp_path / "p")
    listed = json.loads(manifest.read_text())
    from graphopt.program.manifest import _sha256

    for text in ("{}", "[]", "{", '{"disabled": [], "passes": [{"name": "x"}]}'):
        file.write_text(text)
        listed["files"]["report.json"] = _sha256(file)
        manifest.write_text(json.dumps(listed))
        with pytest.raises(ProgramFormatError, match=r"report\.json is damaged"):
            load_report(tmp_path / "p")
    del listed["files"]["report.json"]
    manifest.write_text(json.dumps(listed))
    file.unlink()
    with pytest.raises(NoRecordError, match="compile it again"):
        graphopt.explain(graphopt.load_program(tmp_path / "p"))


def test_the_documentation_prints_what_it_says(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "explain.md").read_text()
    (code,) = re.findall(r"^`my_model.py`\n\n```python\n(.*?)^```", page, re.M | re.S)
    (output,) = re.findall(r"^It prints\n\n```text\n(.*?)^```", page, re.M | re.S)
    (tmp_path / "my_model.py").write_text(code)
    command = [sys.executable, "my_model.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout == output, done.stderr


@pytest.mark.parametrize(
    ("paths", "wanted"),
    [
        (["norm"], "norm"),
        ([""], ""),
        (["layers.3.mlp"], "layers.3.mlp"),
        (["layers.0.mlp", "layers.1.mlp", "layers.3.mlp"], "layers.{0-1,3}.mlp"),
        (["h.9.x", "h.10.x", "h.10.x"], "h.{9-10}.x"),
        (["a.0.e.5", "a.1.e.5"], "a.{0-1}.e.5"),
        (["block1.attn", "block2.attn"], "block{1-2}.attn"),
    ],
)
def test_layer_ranges(paths: list[str], wanted: str) -> None:
    assert len({layer_shape(path) for path in paths}) == 1
    assert layer_range(paths) == wanted


def test_numbers_inside_a_name_are_part_of_it() -> None:
    assert layer_shape("net.conv1d") != layer_shape("net.conv2d")
    assert layer_shape("net.0.k") != layer_shape("net.k")


def test_brackets_of_a_reason_are_no_markup() -> None:
    def run(text: str) -> Explanation:
        report = Report()
        graph = graphopt.capture(Negations(1).eval(), torch.randn(2, 3))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(registry, "_REGISTRY", {**registry.all_passes(), "fold_pairs": FoldPairs})
            patch.setattr(FoldPairs, "check", lambda self, g, node: Reject("c", text, node))
            PassManager(["fold_pairs"]).run(graph, report)
            return graphopt.explain(report)

    assert "[batch, heads] [/x]" in printed(run("expected [batch, heads] [/x]"))


def test_no_candidates() -> None:
    assert PassRun("p", "fuse", 1, ()).summary == "no candidates"
    text: Any = printed(Explanation((PassRun("p", "fuse", 1, ()), PassRun("q", "", 0, ()))))
    assert "no candidates" in text
    assert "disabled, did not run" in text
