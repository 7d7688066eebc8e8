"""The marker around masks that capture makes in place of transformers' own.

Such a mask `[B, T]` says only which keys are padding; its causality and window travel beside it as
attributes, so nothing but `graphopt::attention` may read it. The marker op makes it findable in
the captured graph, where `take_out` checks every reader.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.clean import remove_dead
from graphopt.ir.graph import Graph, argument, is_call
from graphopt.ops import attention

# torch leaves these three methods untyped. The library is process-wide because torch's is.
_LIBRARY: Any = torch.library.Library("graphopt_capture", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("mask(Tensor visible_BT) -> Tensor")
_LIBRARY.impl("mask", torch.clone, "CompositeExplicitAutograd")
torch.library.register_fake("graphopt_capture::mask", torch.empty_like, lib=_LIBRARY)
MASK = torch.ops.graphopt_capture.mask.default


def mark(visible_BT: Tensor) -> Tensor:
    """A copy, through the marker op."""
    marked: Tensor = MASK(visible_BT)
    return marked


def take_out(graph: Graph) -> fx.Node | None:
    """Let attention read the masks without their marker.

    Returns the first node that reads a marked mask as anything else than padding of attention; the
    graph is then left as it was, and what it computes is wrong.
    """
    markers = graph.calls(MASK)
    for marker in markers:
        for user in marker.users:
            if not _is_padding_of(marker, user):
                return user
    for marker in markers:
        (operand,) = marker.all_input_nodes
        marker.replace_all_uses_with(operand)
    remove_dead(graph)
    return None


def _is_padding_of(marker: fx.Node, user: fx.Node) -> bool:
    if not is_call(user, attention.SPEC.overload) or argument(user, "pad_BT") is not marker:
        return False
    return [*user.args, *user.kwargs.values()].count(marker) == 1
