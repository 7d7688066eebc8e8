"""`.gir`: what is printed reads back as the same graph, and nothing else reads at all."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.run_graph import CLEANUP, FUSE, apply, run
from helpers.tiny_models import tiny_llama
from torch import nn

from graphopt.capture import capture
from graphopt.errors import ProgramFormatError
from graphopt.ir.graph import Graph
from graphopt.ir.text.parser import GraphReader, first_difference, parse_graph
from graphopt.ir.text.printer import canonical_text, print_graph


def stages() -> dict[str, Graph]:
    captured = capture(tiny_llama())
    fused = captured.copy()
    apply(fused, *CLEANUP, *FUSE)
    serving = fused.copy()
    apply(serving, "insert_kv_cache")
    return {"captured": captured, "fused": fused, "serving": serving}


@pytest.fixture(scope="module")
def graphs() -> dict[str, Graph]:
    return stages()


@pytest.mark.parametrize("stage", ["captured", "fused", "serving"])
def test_round_trip(graphs: dict[str, Graph], stage: str) -> None:
    graph = graphs[stage]
    text = print_graph(graph)
    again = parse_graph(text, graph.weights)
    assert first_difference(graph, again) is None
    assert print_graph(again) == text
    assert again.dialect == graph.dialect


def test_the_parsed_graph_computes_the_same(graphs: dict[str, Graph]) -> None:
    graph = graphs["fused"]
    ids = torch.randint(0, 101, (2, 9))
    again = parse_graph(print_graph(graph), graph.weights)
    assert torch.equal(run(again, ids), run(graph, ids))


def test_printing_is_stable_and_free_of_fx_names(graphs: dict[str, Graph]) -> None:
    graph = graphs["fused"]
    text = print_graph(graph)
    renamed = graph.copy()
    for index, node in enumerate(renamed.nodes):
        node.name = f"zz_{index}"
    assert print_graph(renamed) == text
    assert "s72" not in text
    assert "f32[batch, sequence, 64]" in text


def test_a_value_keeps_its_number_through_passes(graphs: dict[str, Graph]) -> None:
    def lines(graph: Graph) -> dict[str, str]:
        text = print_graph(graph).splitlines()
        return {line.partition(" ")[0]: line for line in text if line.startswith("%")}

    before, after = lines(graphs["captured"]), lines(graphs["fused"])
    norms = [n for n in after if "graphopt.rms_norm" in after[n]]
    assert len(norms) == 5
    for norm in norms:
        # The fused op stands for the last of the ops it replaces, under its name.
        assert "aten.mul" in before[norm]
    linears = [n for n in after if "aten.linear" in after[n]]
    assert linears
    for number in linears:
        assert after[number].split("@")[1] == before[number].split("@")[1]
    assert not set(after) & set(lines(graphs["serving"]))


def test_the_canonical_text_forgets_where_a_graph_comes_from(graphs: dict[str, Graph]) -> None:
    graph = graphs["fused"]
    text = canonical_text(graph)
    assert "%0 : " in text
    assert "modeling_llama" not in text
    assert "# model.layers.1.mlp" in text
    again = parse_graph(text, graph.weights)
    assert canonical_text(again) == text
    assert first_difference(graph, again) is not None
    assert first_difference(graph, again, canonical=True) is None


def test_weights_of_identical_layers_share_a_line(graphs: dict[str, Graph]) -> None:
    text = print_graph(graphs["fused"])
    assert "weight @model.layers.{0-1}.self_attn.q_proj.weight : f32[64, 64]" in text
    assert "weight @model.layers.0" not in text


def test_a_difference_is_found(graphs: dict[str, Graph]) -> None:
    graph = graphs["fused"]
    other = graph.copy()
    node = other.calls(torch.ops.graphopt.rms_norm.default)[1]
    node.kwargs = {**node.kwargs, "eps": 0.5}
    difference = first_difference(graph, other)
    assert difference is not None
    assert "eps=0.5" in difference


BAD = [
    (r"gir 1", "gir 9", "expected 'gir 1'"),
    (r"aten\.linear\(", "os.system(", "unknown op"),
    (r"aten\.linear\(", "aten.__class__(", "unknown op"),
    (r"aten\.linear\(", "aten.no_such_op(", "unknown op"),
    (r"sym_size\.int\(%input_ids, 1\)", "sym_size.int(%nothing, 1)", "not defined"),
    (r"eps=1e-06", "eps=oops", "not a value"),
    (r"causal=True, ", "causal=True ", "expected ','"),
    (r"causal=True, ", "causal=True, causal=True, ", "given twice"),
    (r"f32\[batch, sequence, 96\]", "f32[batch, sequence, 97]", "the operands give"),
    (r"weight @model\.norm\.weight", "weight @model.nrm.weight", "not in the weights"),
    (r"weight @model\.norm\.weight : f32\[64\]", "weight @model.norm.weight : f32[65]", "says"),
    (r"return %\d+\n", "", "before 'return'"),
    (r"return (%\d+)\n", "return \\1\nextra\n", "after return"),
    (r"input %input_ids : i64\[batch, sequence\]", "input %input_ids : i64[batch*2, 3]", "size"),
    (r"graphopt\.swiglu\((%\d+), (%\d+)\)", "graphopt.swiglu(\\1)", "type-check"),
    (r"\n%(\d+) : (.*\n)%\d+ : ", "\n%\\1 : \\2%\\1 : ", "twice"),
    (r"layers\.\{0-1\}\.self_attn", "layers.{0-2}.self_attn", "not in the weights"),
    (r"layers\.\{0-1\}\.self_attn", "layers.{1-0}.self_attn", "no range"),
]


@pytest.mark.parametrize(("pattern", "replacement", "message"), BAD)
def test_bad_text_is_refused_with_its_line(
    graphs: dict[str, Graph], pattern: str, replacement: str, message: str
) -> None:
    graph = graphs["fused"]
    text, count = re.subn(pattern, replacement, print_graph(graph), count=1)
    assert count == 1, pattern
    with pytest.raises(ProgramFormatError, match=message) as error:
        parse_graph(text, graph.weights)
    assert re.search(r"line \d+", str(error.value))
    reader = GraphReader()
    assert first_difference(graph, reader.read(print_graph(graph), graph.weights)) is None
    with pytest.raises(ProgramFormatError, match=message):
        reader.read(text, graph.weights)


def test_every_truncation_is_refused(graphs: dict[str, Graph]) -> None:
    graph = graphs["fused"]
    lines = print_graph(graph).splitlines()
    for count in range(0, len(lines) - 1, 7):
        with pytest.raises(ProgramFormatError):
            parse_graph("\n".join(lines[:count]), graph.weights)


# torch.export itself takes no quotes and no line ends.
ODD = ("a b", "a|b", "a # b", "ba\\ck", "\\u00007c", " lead", "trail ", "ü€😀", "b,c", "{0-3}", "0")


@pytest.mark.parametrize("name", ODD)
def test_any_module_name_reads_back(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({name: nn.Linear(4, 4), "plain": nn.Linear(4, 4)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts.values():
                x = part(x)
            return x

    graph = capture(Model().eval(), torch.randn(2, 4))
    assert f"parts.{name}.weight" in graph.weights
    assert f"parts.{name}" in {node.meta["layer"] for node in graph.nodes}
    text = print_graph(graph)
    again = parse_graph(text, graph.weights)
    assert first_difference(graph, again) is None
    assert set(again.weights) == set(graph.weights)
    assert [n.meta["layer"] for n in again.nodes if n.op == "call_function"] == [
        n.meta["layer"] for n in graph.nodes if n.op == "call_function"
    ]
    assert print_graph(again) == text


def test_weights_of_a_sequential_read_back() -> None:
    graph = capture(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval(), torch.randn(2, 4))
    text = print_graph(graph)
    assert "weight @{0-1}.bias : f32[4]" in text
    assert first_difference(graph, parse_graph(text, graph.weights)) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("dtype.f32", '"\\q"'),
        ("%input_ids)", "[" * 5000),
        ("i64[batch, sequence]", f"i64[batch, {10**23 - 1}]"),
    ],
)
def test_what_python_and_torch_raise_is_a_format_error(
    graphs: dict[str, Graph], old: str, new: str
) -> None:
    graph = graphs["captured"]
    text = print_graph(graph)
    with pytest.raises(ProgramFormatError, match=r"line \d+"):
        parse_graph(text.replace(old, new, 1) if old in text else new, graph.weights)
