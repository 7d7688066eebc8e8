"""Masks that hide nothing: what is left of a causal mask when there is one token.

    if n > 1: scores = scores + full((n, n), -inf).triu(1)

For n = 1 that adds a zero. Whether a mask is made of sizes alone, and idle, is found by making it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.graph import argument, is_call

aten = torch.ops.aten
NumberOf = Callable[[fx.Node], int | None]
"""The number that a node's size is; None when it stays open, or the node is no size."""

_READ_TYPE = (aten.type_as.default, aten.to.other)
_MOST_NODES = 50
_MOST_ELEMENTS = 4096


def without_idle_mask(node: fx.Node, number_of: NumberOf) -> fx.Node | None:
    """The operand that `node` hands on unchanged, its mask being idle; None when it is not."""
    if is_call(node, aten.add.Tensor) and argument(node, "alpha") == 1:
        a, b = node.args[:2]
        candidates = [(a, b, 0), (b, a, 0)]
    elif is_call(node, aten.masked_fill.Scalar):
        candidates = [(node.args[0], node.args[1], False)]
    elif is_call(node, aten.where.ScalarOther):
        candidates = [(node.args[1], node.args[0], True)]
    else:
        return None
    for operand, mask, idle in candidates:
        if not isinstance(operand, fx.Node) or not isinstance(mask, fx.Node):
            continue
        whole, kept = node.meta["val"], operand.meta["val"]
        if not isinstance(kept, Tensor) or kept.dtype != whole.dtype or kept.ndim != whole.ndim:
            continue
        made = _made(mask, number_of)
        # Of one element, so that it makes nothing larger.
        if made is not None and made.numel() == 1 and bool((made == idle).all()):
            return operand
    return None


def _made(mask: fx.Node, number_of: NumberOf) -> Tensor | None:
    """The value of a node that depends on sizes alone; None for any other."""
    needed: set[fx.Node] = set()
    values: dict[Any, Any] = {}
    waiting = [mask]
    while waiting:
        node = waiting.pop()
        if node in needed or number_of(node) is not None:
            continue
        if node.op != "call_function" or len(needed) == _MOST_NODES:
            return None
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            return None
        needed.add(node)
        read = node.all_input_nodes
        if is_call(node, *_READ_TYPE):
            # Of the second operand only the dtype is read.
            values[node.args[1]] = torch.empty(0, dtype=node.meta["val"].dtype)
            read = [operand for operand in read if operand is not node.args[1]]
        waiting += read
    for node in mask.graph.nodes:
        if node in needed:
            operands = [n for n in node.all_input_nodes if n not in values]
            values |= {operand: number_of(operand) for operand in operands}
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            assert callable(node.target)
            values[node] = node.target(*args, **kwargs)
            if isinstance(values[node], Tensor) and values[node].numel() > _MOST_ELEMENTS:
                return None
    made = values.get(mask)
    return made if isinstance(made, Tensor) else None
