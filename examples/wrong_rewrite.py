"""A model, and a pass that spoils one of its 30 layers.

graphopt bisect examples/wrong_rewrite.py
"""

from collections.abc import Iterable

import torch
from torch import fx
from transformers import LlamaConfig, LlamaForCausalLM

from graphopt.ir.builder import GraphBuilder, replace
from graphopt.ir.graph import Graph
from graphopt.ops import rms_norm
from graphopt.passes.base import Pass, Reject
from graphopt.passes.registry import register


@register
class RewriteNorms(Pass[fx.Node]):
    """Rewrites every norm to itself, but that of layer 17 to another epsilon."""

    name, stage, after = "rewrite_norms", "fuse", ("fuse_norm",)

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        return graph.calls(rms_norm.SPEC.overload)

    def check(self, graph: Graph, node: fx.Node) -> fx.Node | Reject:
        return node

    def rewrite(self, builder: GraphBuilder, bound: fx.Node) -> None:
        is_bad = bound.meta["layer"] == "model.layers.17.input_layernorm"
        kwargs = {**bound.kwargs, "eps": 0.5} if is_bad else bound.kwargs
        new = builder.emit(bound.target, bound.args, dict(kwargs), like=[bound])
        replace(builder.graph, bound, new)


torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=30,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=101,
)
model = LlamaForCausalLM(config).eval()
