"""bisect finds the one wrong rewrite among many right ones."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers.tiny_models import tiny_llama
from torch import fx
from typer.testing import CliRunner

import graphopt
from graphopt.cli import app as cli
from graphopt.errors import PassError, UnsupportedError
from graphopt.ir.builder import GraphBuilder, replace
from graphopt.ir.graph import Graph
from graphopt.ops import rms_norm
from graphopt.passes import registry
from graphopt.passes.base import Pass, Reject, Stage
from graphopt.passes.registry import register

BROKEN_LAYER = 17


@pytest.fixture
def wrong_pass() -> Iterator[type[Pass[Any]]]:
    """A pass that rewrites every norm to itself, but one to another epsilon."""

    class RewriteNorms(Pass[fx.Node]):
        name: ClassVar[str] = "rewrite_norms"
        stage: ClassVar[Stage] = "fuse"
        after: ClassVar[tuple[str, ...]] = ("fuse_norm",)

        def match(self, graph: Graph) -> Iterable[fx.Node]:
            return graph.calls(rms_norm.SPEC.overload)

        def check(self, graph: Graph, node: fx.Node) -> fx.Node | Reject:
            return node

        def rewrite(self, builder: GraphBuilder, bound: fx.Node) -> None:
            kwargs = dict(bound.kwargs)
            if bound.meta["layer"] == f"model.layers.{BROKEN_LAYER}.input_layernorm":
                kwargs["eps"] = 0.5
            with builder.at(bound):
                new = builder.emit(bound.target, bound.args, kwargs, like=[bound])
            replace(builder.graph, bound, new)

    register(RewriteNorms)
    yield RewriteNorms
    del registry._REGISTRY["rewrite_norms"]


def test_the_wrong_layer_of_thirty_is_found(wrong_pass: type[Pass[Any]], tmp_path: Path) -> None:
    found = graphopt.bisect(tiny_llama(layers=30, intermediate_size=32))
    assert found is not None
    assert found.site is not None
    assert (found.pass_name, found.site.layer) == (
        "rewrite_norms",
        f"model.layers.{BROKEN_LAYER}.input_layernorm",
    )
    assert found.site.source.startswith("modeling_llama.py:")
    assert found.error is not None
    assert found.error_before is not None
    assert found.error_before < 1e-5 < found.error
    changed = [
        line
        for line in found.diff.splitlines()
        if line[0] in "+-" and line[:3] not in ("+++", "---")
    ]
    assert len(changed) == 2
    assert "eps=0.5" in changed[1]
    assert found.site.name in str(found)
    assert str(found).endswith(found.diff.rstrip())

    found.save(tmp_path / "case")
    command = [sys.executable, str(tmp_path / "case" / "reproduce.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "eps=0.5" in printed
    error = float(printed.rpartition("rewrite: ")[2])
    assert error == pytest.approx(found.error, rel=0.2)
    with pytest.raises(UnsupportedError, match="not an empty folder"):
        found.save(tmp_path / "case")


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert graphopt.bisect(tiny_llama()) is None


def test_an_oracle_of_ones_own(wrong_pass: type[Pass[Any]]) -> None:
    model = tiny_llama(layers=3)

    def is_good(graph: Graph) -> bool:
        return graph.op_counts()["graphopt.rms_norm"] < 4

    found = graphopt.bisect(model, is_good=is_good)
    assert found is not None
    assert found.site is not None
    assert (found.site.name, found.error) == ("fuse_norm#3", None)
    with pytest.raises(PassError, match="bad already"):
        graphopt.bisect(model, is_good=lambda _: False)
    assert graphopt.bisect(model, is_good=is_good, disable=["fuse_norm"]) is None


def test_a_pass_that_raises_is_found() -> None:
    def is_good(graph: Graph) -> bool:
        if graph.op_counts()["graphopt.rope"] > 2:
            raise ValueError("three of them")
        return True

    found = graphopt.bisect(tiny_llama(), is_good=is_good)
    assert found is not None
    assert found.site is not None
    assert (found.site.name, found.failure) == ("fuse_rope#2", "ValueError: three of them")
    assert "it raised ValueError: three of them" in str(found)
    assert "relative error" not in str(found)


def test_the_command(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,\n"
        "    num_attention_heads=2, num_key_value_heads=1, vocab_size=50)\n"
        "model = LlamaForCausalLM(config).eval()\n"
        "def is_good(graph):\n"
        "    return graph.op_counts()['graphopt.swiglu'] < 2\n"
    )
    out = tmp_path / "case"
    done = CliRunner().invoke(cli.app, ["bisect", str(script), "--out", str(out)])
    assert done.exit_code == 1, done.output
    assert "fuse_mlp#1 in model.layers.1.mlp" in done.output
    assert {p.name for p in out.iterdir()} >= {"before.gir", "after.gir", "reproduce.py"}
    script.write_text("x = 1\n")
    done = CliRunner().invoke(cli.app, ["bisect", str(script)])
    assert isinstance(done.exception, UnsupportedError)


def test_low_bit_weights_are_refused_with_the_way_out() -> None:
    graph = graphopt.capture(tiny_llama())
    name = next(iter(graph.weights))
    graph.packed[name] = None  # type: ignore[assignment]
    with pytest.raises(UnsupportedError, match="weights='dense'"):
        graphopt.bisect(graph)


def test_random_inputs_of_a_masked_model() -> None:
    from graphopt.check.oracle import outputs_of, random_inputs

    ids = torch.randint(0, 101, (2, 9))
    graph = graphopt.capture(tiny_llama(), {"input_ids": ids, "attention_mask": ids.clamp(max=1)})
    made = random_inputs(graph, seed=3)
    assert made[0].max() < 101
    assert set(made[1].unique().tolist()) <= {0, 1}
    assert torch.isfinite(outputs_of(graph, made)[0]).all()


def test_a_rewrite_that_raises_is_found_with_its_place(
    wrong_pass: type[Pass[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(self: Any, builder: GraphBuilder, bound: fx.Node) -> None:
        if bound.meta["layer"] == "model.layers.1.input_layernorm":
            raise KeyError("no such thing")
        with builder.at(bound):
            new = builder.emit(bound.target, bound.args, dict(bound.kwargs), like=[bound])
        replace(builder.graph, bound, new)

    monkeypatch.setattr(wrong_pass, "rewrite", raising)
    found = graphopt.bisect(tiny_llama(3))
    assert found is not None
    assert found.site is not None
    assert (found.site.name, found.site.layer) == (
        "rewrite_norms#2",
        "model.layers.1.input_layernorm",
    )
    assert found.failure == "KeyError: 'no such thing'"
    found.save(tmp_path / "case")
    assert "PassManager(['rewrite_norms'])" in (tmp_path / "case" / "reproduce.py").read_text()


@pytest.mark.parametrize(
    "option", [{"tolerance": -1.0}, {"tolerance": float("nan")}, {"is_good": 5}]
)
def test_bad_options_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(option))):
        graphopt.bisect(tiny_llama(1), **option)


def rescaling(monkeypatch: pytest.MonkeyPatch, cls: type[Pass[Any]], factor: float) -> None:
    """The pass multiplies the last norm by `factor`, and nothing else."""

    def rewrite(self: Any, builder: GraphBuilder, bound: fx.Node) -> None:
        with builder.at(bound):
            new = builder.emit(bound.target, bound.args, dict(bound.kwargs), like=[bound])
            if bound.meta["layer"] == "model.norm":
                scaled = builder.emit(torch.ops.aten.mul.Tensor, [new, factor], like=[bound])
                scaled.meta["layer"] = bound.meta["layer"]
                new = scaled
        replace(builder.graph, bound, new)

    monkeypatch.setattr(cls, "rewrite", rewrite)


@pytest.mark.parametrize(
    ("dtype", "factor", "is_found"),
    [
        (torch.float32, 1.01, True),
        (torch.float32, 1.00001, False),
        (torch.float64, 1.01, True),
        (torch.bfloat16, 1.2, True),
        (torch.bfloat16, 1.01, False),
    ],
)
def test_what_counts_as_rounding_goes_by_the_dtype(
    wrong_pass: type[Pass[Any]],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    factor: float,
    is_found: bool,
) -> None:
    rescaling(monkeypatch, wrong_pass, factor)
    found = graphopt.bisect(tiny_llama(1).to(dtype), serving=False)
    if not is_found:
        assert found is None
        return
    assert found is not None
    assert found.site is not None
    assert (found.site.name, found.site.layer) == ("rewrite_norms#2", "model.norm")
    assert found.error == pytest.approx(factor - 1, rel=0.1)


def test_a_tolerance_of_ones_own(
    wrong_pass: type[Pass[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rescaling(monkeypatch, wrong_pass, 1.01)
    model = tiny_llama(1)
    assert graphopt.bisect(model, serving=False, tolerance=0.05) is None
    found = graphopt.bisect(model, serving=False, tolerance=0.005)
    assert found is not None
    # With a limit the pass gets no further than what it may apply.
    assert graphopt.bisect(model, serving=False, limits={"rewrite_norms": 2}) is None


def test_only_a_new_or_an_empty_folder_is_written(
    wrong_pass: type[Pass[Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rescaling(monkeypatch, wrong_pass, 2.0)
    found = graphopt.bisect(tiny_llama(1), serving=False)
    assert found is not None
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UnsupportedError, match="not an empty folder"):
        found.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "a" / "new"):
        found.save(folder)
        assert (folder / "weights.safetensors").is_file()


def test_a_required_pass_is_bad_as_a_whole() -> None:
    found = graphopt.bisect(tiny_llama(1), is_good=lambda graph: graph.dialect == "captured")
    assert found is not None
    assert (found.pass_name, found.site, found.failure) == ("insert_kv_cache", None, "")
    assert found.after is not None
    assert str(found).startswith("first bad rewrite: insert_kv_cache\n")
