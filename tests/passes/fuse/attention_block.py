"""A module around one attention, fused and compared."""

from __future__ import annotations

from collections.abc import Callable

import torch
from helpers.run_graph import CLEANUP, apply, assert_close, assert_idempotent, run
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.ir.graph import Graph, argument
from graphopt.ops import attention
from graphopt.record.report import Report

HEADS, WIDTH = 4, 8


class Attention(nn.Module):
    """q, k, v projections of embedded ids around `attend(q, k, v)`."""

    def __init__(self, attend: Callable[..., Tensor], kv_heads: int = HEADS) -> None:
        super().__init__()
        self.attend, self.kv_heads = attend, kv_heads
        self.embed = nn.Embedding(50, HEADS * WIDTH)
        self.q = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)
        self.k = nn.Linear(HEADS * WIDTH, kv_heads * WIDTH)
        self.v = nn.Linear(HEADS * WIDTH, kv_heads * WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        q, k, v = (
            p(x).view(x.shape[0], x.shape[1], -1, WIDTH).transpose(1, 2)
            for p in (self.q, self.k, self.v)
        )
        return self.attend(q, k, v).transpose(1, 2).flatten(2)


def fuse(attend: Callable[..., Tensor], kv_heads: int = HEADS) -> tuple[Graph, Report]:
    """Fused graph; its values are checked against the graph before."""
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (3, 11))
    graph = capture(Attention(attend, kv_heads).eval(), ids)
    before = run(graph, ids)
    report = apply(graph, *CLEANUP, "fuse_attention", "dead_code")
    assert_close(run(graph, ids), before)
    assert_idempotent(graph, ["fuse_attention", "dead_code"])
    return graph, report


def the_attention(graph: Graph) -> dict[str, object]:
    """The arguments of the only attention."""
    (node,) = graph.calls(attention.SPEC.overload)
    names = ("mask", "pad_BT", "scale", "causal", "window", "softcap", "predicate", "bias")
    return {name: argument(node, name) for name in names}


def code(attend: Callable[..., Tensor]) -> str:
    """The code that `attend` is rejected with."""
    graph, report = fuse(attend)
    assert not graph.calls(attention.SPEC.overload)
    (rejection,) = report.rejections("fuse_attention")
    # The line that torch.export keeps is that of the module's forward.
    assert rejection.source.startswith("attention_block.py:")
    return rejection.code
