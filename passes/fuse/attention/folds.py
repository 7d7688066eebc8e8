"""Heads that were folded into the batch, taken apart again.

[B, H, S, D] -> view [B * H, S, D]
[S, B, H * D] -> view [S, B * H, D] -> transpose(0, 1)      nn.MultiheadAttention
"""

from __future__ import annotations

import torch
from torch import fx

from graphopt.ir.graph import argument, is_call, shape_of
from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks.values import size_expr
from graphopt.passes.fuse.attention.operands import COPIES, FLATTEN, VIEWS, Operand, first

aten = torch.ops.aten


def unfolded(operand: Operand) -> Operand | None:
    """`[B, H, S, D]` of a `[B * H, S, D]` operand that was made of it."""
    node = _uncopied(operand.node)
    if operand.steps and operand.steps != ((aten.transpose.int, (-1, -2)),):
        return None
    if is_call(node, aten.transpose.int) and len(shape_of(node)) == 3:
        swapped = {int(argument(node, d)) % 3 for d in ("dim0", "dim1")}
        if swapped == {0, 1}:
            inner = _tokens_first(_uncopied(first(node)))
            return None if inner is None else Operand(inner.node, (*inner.steps, *operand.steps))
        inner = unfolded(Operand(first(node)))
        return None if inner is None or swapped != {1, 2} else _swapped(inner, operand)
    if not is_call(node, *VIEWS, *FLATTEN):
        return None
    base = first(node)
    if len(shape_of(base)) != 4 or str(shape_of(base)[2:]) != str(shape_of(node)[1:]):
        return None
    return Operand(base, operand.steps)


def _uncopied(node: fx.Node) -> fx.Node:
    while is_call(node, *COPIES):
        node = first(node)
    return node


def _tokens_first(view: fx.Node) -> Operand | None:
    """`[B, H, S, D]` of a view `[S, B * H, D]`."""
    if not is_call(view, *VIEWS, *FLATTEN):
        return None
    base = first(view)
    tokens, folded, width = shape_of(view)
    own = shape_of(base)
    whole = own[2] if len(own) == 3 else None
    if len(own) == 3 and isinstance(whole, int) and isinstance(width, int):
        heads = whole // width
        apart = Operand(base).then(aten.unflatten.int, -1, [heads, width])
    elif len(own) == 4 and isinstance(own[2], int) and str(own[3]) == str(width):
        heads, apart = own[2], Operand(base)
    else:
        return None
    if str(own[0]) != str(tokens) or ia.times(size_expr(own[1]), heads) != size_expr(folded):
        return None
    return apart.then(aten.permute.default, [1, 2, 0, 3])


def _swapped(inner: Operand, outer: Operand) -> Operand:
    """A swap below and the swaps above, cancelled where they meet."""
    swaps = 1 + len(outer.steps)
    return inner if swaps % 2 == 0 else inner.then(aten.transpose.int, -1, -2)
