"""Differences of graph texts, by value and by layer."""

from __future__ import annotations

import torch
from helpers.run_graph import CLEANUP, FUSE, apply
from helpers.tiny_models import tiny_llama
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.ir.graph import Graph
from graphopt.ir.text.printer import print_graph
from graphopt.record.diff import align, collapsed_diff, is_change, read_line
from graphopt.record.layers import layer_block


def fused(graph: Graph, name: str) -> tuple[str, str]:
    before = print_graph(graph)
    apply(graph, name)
    return before, print_graph(graph)


def test_a_fusion_in_every_layer_is_shown_once() -> None:
    graph = capture(tiny_llama(layers=4))
    apply(graph, *CLEANUP)
    before, after = fused(graph, "fuse_norm")
    text = collapsed_diff(before, after, "08.gir", "09.gir")
    lines = text.splitlines()
    assert lines[:3] == ["--- 08.gir", "+++ 09.gir", "@@ model.layers.{0-3} x4 @@"]
    assert [line for line in lines if line.startswith("@@")][1:] == ["@@ model.norm @@"]
    added = [line for line in lines if line.startswith("+%")]
    assert len(added) == 3
    assert all("graphopt.rms_norm" in line for line in added)
    removed = [line for line in lines if line.startswith("-%")]
    assert len(removed) == 3 * 6
    # A value that the fused op stands for keeps its number, and its readers are not mentioned.
    assert added[0].split()[0][1:] in {line.split()[0][1:] for line in removed}
    assert "aten.linear" not in text


def test_a_layer_that_changed_otherwise_is_a_hunk_of_its_own() -> None:
    graph = capture(tiny_llama(layers=4))
    apply(graph, *CLEANUP)
    before = print_graph(graph)
    silus = graph.calls(torch.ops.aten.silu.default)
    assert len(silus) == 4
    for index, node in enumerate(silus):
        node.target = torch.ops.aten.relu.default if index == 2 else torch.ops.aten.gelu.default
    titles = [
        line for line in collapsed_diff(before, print_graph(graph)).splitlines() if "@@" in line
    ]
    assert titles == ["@@ model.layers.{0-1,3} x3 @@", "@@ model.layers.2 @@"]


def test_layers_that_read_other_layers_are_not_alike() -> None:
    graph = capture(tiny_llama(layers=3))
    apply(graph, *CLEANUP)
    before = print_graph(graph)
    silus = graph.calls(torch.ops.aten.silu.default)
    for index, node in enumerate(silus):
        own = node.args[0]
        # Layer 2 gets the gate of layer 1: the same op, another operand.
        node.args = (silus[1].args[0],) if index == 2 else (own,)
        node.target = torch.ops.aten.relu.default
    text = collapsed_diff(before, print_graph(graph))
    assert "@@ model.layers.{0-1} x2 @@" in text
    assert "@@ model.layers.2 @@" in text


def test_the_lines_of_both_texts_are_all_there_and_in_order() -> None:
    graph = capture(tiny_llama())
    apply(graph, *CLEANUP, *FUSE)
    before, after = fused(graph, "insert_kv_cache")
    pairs = align(before, after)
    assert [a for a, _ in pairs if a is not None] == before.splitlines()
    assert [b for _, b in pairs if b is not None] == after.splitlines()
    # The serving graph has new values; a layer's ops stand beside those they were made from.
    linears = [(a, b) for a, b in pairs if a and b and "aten.linear" in a]
    assert len(linears) == 2 * 7 + 1
    for a, b in linears:
        assert read_line(a).layer == read_line(b).layer
        assert is_change((a, b))
    text = collapsed_diff(before, after)
    assert "+input %k_cache_{0-1} : f32[blocks, block_size, 2, 16] cache" in text
    assert "+input %v_cache_{0-1} : f32[blocks, block_size, 2, 16] cache" in text


def test_equal_texts_and_history_alone_are_no_change() -> None:
    graph = capture(tiny_llama())
    text = print_graph(graph)
    assert collapsed_diff(text, text) == ""
    node = graph.calls(torch.ops.aten.linear.default)[0]
    node.meta["history"] |= {"some_pass#3"}
    assert print_graph(graph) != text
    assert collapsed_diff(text, print_graph(graph)) == ""


def test_a_new_line_that_reads_another_layer_is_not_alike() -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(torch.sin(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(Block() for _ in range(5)))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layers(x)
            return out

    graph = capture(Model().eval(), torch.randn(2, 4))
    sines = graph.calls(torch.ops.aten.sin.default)
    tanhs = graph.calls(torch.ops.aten.tanh.default)
    before = print_graph(graph)
    for sine, tanh in zip(sines, tanhs, strict=True):
        # What is read is new to the changed lines: only its place tells a wrong layer.
        tanh.args = (sine.args[0],)
    assert "@@ layers.{0-4} x5 @@" in collapsed_diff(before, print_graph(graph))
    tanhs[3].args = (sines[1].args[0],)
    titles = [t for t in collapsed_diff(before, print_graph(graph)).splitlines() if "@@" in t]
    assert titles == ["@@ layers.{0-2,4} x4 @@", "@@ layers.3 @@"]


def test_blocks_of_layers() -> None:
    assert layer_block("stage1.layers.2.mlp") == "stage1.layers.2"
    assert layer_block("block3.conv") == "block3"
    assert layer_block("model.layers.7.mlp.act_fn") == "model.layers.7"
    assert layer_block("h.3") == "h.3"
    assert layer_block("model.norm") == "model.norm"
    assert layer_block("") == ""
