"""Markers around what capture hands to a transformers model in place of its own values.

A mask `[B, T]` says only which keys are padding; its causality and window travel beside it as
attributes, so nothing but `graphopt::attention` may read it; and it may have been made on the
condition that positions are 0, 1, 2 and so on. Attention weights `[B, H, S, T]` are not computed at
all, so nothing may read them. The marker ops make both findable in the captured graph, where
`take_out` checks every reader.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.clean import remove_dead
from graphopt.ir.graph import Graph, argument, is_call, shape_of, where
from graphopt.ops import attention

# torch leaves these methods untyped. The library is process-wide because torch's is.
_LIBRARY: Any = torch.library.Library("graphopt_capture", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("mask(Tensor visible_BT, Tensor? positions=None) -> Tensor")
_LIBRARY.define("weights(Tensor q_BHSD, Tensor k_BGTD) -> Tensor")


def _mask(visible_BT: Tensor, _positions: Tensor | None = None) -> Tensor:
    return torch.clone(visible_BT)


def _weights(q_BHSD: Tensor, k_BGTD: Tensor) -> Tensor:
    sizes = (*q_BHSD.shape[:3], k_BGTD.shape[2])
    return torch.full(sizes, float("nan"), dtype=q_BHSD.dtype, device=q_BHSD.device)


for _name, _function in (("mask", _mask), ("weights", _weights)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphopt_capture::{_name}", _function, lib=_LIBRARY)
MASK = torch.ops.graphopt_capture.mask.default
WEIGHTS = torch.ops.graphopt_capture.weights.default
aten = torch.ops.aten


def mark(visible_BT: Tensor, positions: Tensor | None = None) -> Tensor:
    """A copy, through the marker op.

    positions: must be an iota for the mask to be right, and `visible_BT` all true then.
    """
    marked: Tensor = MASK(visible_BT, positions)
    return marked


def weights_of(q_BHSD: Tensor, k_BGTD: Tensor) -> Tensor:
    """`[B, H, S, T]`: stands for attention weights that nobody may read."""
    marked: Tensor = WEIGHTS(q_BHSD, k_BGTD)
    return marked


def take_out(graph: Graph) -> str | None:
    """Let attention read the masks without their marker.

    Returns why that would be wrong: a reader of a mask other than attention, a reader of attention
    weights, positions that are no iota. The graph is then of no use.
    """
    remove_dead(graph)
    for weights in graph.calls(WEIGHTS):
        return f"the model uses attention weights, from {where(weights)}"
    markers = graph.calls(MASK)
    for marker in markers:
        for user in marker.users:
            if not _is_padding_of(marker, user):
                return f"the model reads its mask in {where(user)}"
        positions = argument(marker, "positions")
        if positions is not None and not _is_iota(positions):
            return f"positions are made by {where(positions)}, and packed sequences follow them"
    for marker in markers:
        if argument(marker, "positions") is not None:
            # It hides nothing, and was there to show the positions.
            for user in list(marker.users):
                user.args = tuple(None if value is marker else value for value in user.args)
        marker.replace_all_uses_with(argument(marker, "visible_BT"))
    remove_dead(graph)
    return None


def _is_padding_of(marker: fx.Node, user: fx.Node) -> bool:
    if not is_call(user, attention.SPEC.overload) or argument(user, "pad_BT") is not marker:
        return False
    return [*user.args, *user.kwargs.values()].count(marker) == 1


_VIEWS = (
    *(aten.unsqueeze.default, aten.expand.default, aten.repeat.default, aten.view.default),
    *(aten.select.int, aten.alias.default, aten.detach.default, aten.clone.default),
    *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default),
    aten.contiguous.default,
)


def _is_iota(node: Any) -> bool:
    """Whether each row is `arange(n)`, perhaps shifted by a number or cut at its end: packed
    sequences are told by the steps between positions, which are all one then."""
    while isinstance(node, fx.Node):
        if is_call(node, aten.arange.default, aten.arange.start):
            return True
        if is_call(node, aten.arange.start_step):
            return bool(argument(node, "step") == 1)
        if is_call(node, aten.add.Tensor, aten.sub.Tensor):
            if not isinstance(argument(node, "other"), int):
                return False
        elif is_call(node, aten.slice.Tensor):
            if argument(node, "step") != 1:
                return False
        elif not is_call(node, *_VIEWS) or not _keeps_rows(node):
            return False
        node = node.all_input_nodes[0]
    return False


def _keeps_rows(node: fx.Node) -> bool:
    """Whether the last axis of a view is as long as that of what it views."""
    before, after = shape_of(node.all_input_nodes[0]), shape_of(node)
    return str(before[-1:]) == str(after[-1:])
