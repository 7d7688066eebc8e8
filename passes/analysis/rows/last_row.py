"""Forwards that compute logits of the last position only: `head(x[:, -1])`, `x[:, [-1], :]`,
`x[:, n - 1 : n]`.

    picked   a value made of the last token row alone. It has no token axis; its batch axis is kept.

A serving step wants the logits of some rows, each the last of its prompt so far. So the op that
picks the last row becomes one that picks the wanted rows, and puts them where the batch was: what
follows treats batch items one by one and never sees a difference. A picked value may only meet
other picked values and constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.graph import argument, axis_of, is_call
from graphopt.passes.analysis.rows.layout import Rows, mixed, sizes, unknown

aten = torch.ops.aten
_COPIES = (aten.lift_fresh_copy.default, aten.detach.default, aten.alias.default)


def picks_last_row(rows: Rows, node: fx.Node, weights: Mapping[str, Tensor]) -> bool:
    """True for a call that takes the last index of the token axis, and nothing else."""
    operand = node.args[0] if node.args else None
    axis, batch = rows.of(operand), rows.batch_of(operand)
    if axis is None or batch is None or axis == batch:
        return False
    rank = len(sizes(operand))
    if is_call(node, aten.index.Tensor):
        used = [(i, at) for i, at in enumerate(argument(node, "indices")) if at is not None]
        return len(used) == 1 and used[0][0] == axis and _is_minus_one(used[0][1], weights)
    if not is_call(node, aten.select.int, aten.slice.Tensor, aten.narrow.default):
        return False
    if axis_of(argument(node, "dim"), rank) != axis:
        return False
    first = argument(node, "index" if is_call(node, aten.select.int) else "start")
    if not is_call(node, aten.select.int):
        # One value from the last on; whatever end is given cuts nothing off.
        step = argument(node, "step") if is_call(node, aten.slice.Tensor) else 1
        if sizes(node)[axis] != 1 or step != 1:
            return False
    if isinstance(first, fx.Node):
        value = first.meta["val"]
        return isinstance(value, torch.SymInt) and value.node.expr == rows.sequence - 1
    return bool(first == -1)


def _is_minus_one(index: Any, weights: Mapping[str, Tensor]) -> bool:
    while is_call(index, *_COPIES):
        index = index.args[0]
    if not isinstance(index, fx.Node) or index.op != "get_attr":
        return False
    value = weights[str(index.target)]
    is_known = value.device.type != "meta" and value.numel() == 1 and value.ndim <= 1
    return is_known and value.dtype != torch.bool and int(value) == -1


def check_picked(rows: Rows, node: fx.Node) -> None:
    """Raise unless a call on picked values meets only values it can stand beside."""
    for operand in node.all_input_nodes:
        value = operand.meta["val"]
        if operand in rows.picked:
            continue
        if isinstance(value, torch.SymInt):
            if value.node.expr.free_symbols and value.node.expr != rows.batch:
                raise mixed(node, "computes with the length of the sequence or of the batch")
        elif rows.of(operand) is not None:
            raise mixed(node, "puts the last token row beside all rows")
        elif rows.batch_of(operand) is not None and not _broadcasts(node):
            raise unknown(node, "puts the last token row beside values of every batch item")


def _broadcasts(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
