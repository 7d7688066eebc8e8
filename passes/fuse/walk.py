"""What the matchers of this stage ask about the neighbourhood of a node."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.fx.node import Argument

from graphopt.ir.builder import GraphBuilder
from graphopt.ir.graph import argument, axis_of, is_call, shape_of

aten = torch.ops.aten
CASTS = (
    aten.to.dtype,
    aten._to_copy.default,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
)
_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


def only_user(node: fx.Node) -> fx.Node | None:
    """The single reader of a node."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def uncast(node: fx.Node) -> fx.Node:
    """The operand of a cast, or the node itself."""
    operand = node.args[0] if is_call(node, *CASTS) else node
    assert isinstance(operand, fx.Node)
    return operand


def other_operand(call: fx.Node, operand: object) -> fx.Node | None:
    """The second tensor of a two-operand call; None for numbers, and for `f(x, x)`."""
    left, right = call.args[:2]
    other = right if left is operand else left
    return other if isinstance(other, fx.Node) and other is not operand else None


def is_last_axis(node: fx.Node, axes: object) -> bool:
    """True when `axes` (a number or a list of one) is the last axis of `node`; a tensor without
    axes has none, though torch takes 0 and -1 of it."""
    rank = len(shape_of(node))
    listed = axes if isinstance(axes, (list, tuple)) else [axes]
    return (
        rank > 0
        and [axis_of(a, rank) for a in listed if isinstance(a, int)] == [rank - 1]
        and len(listed) == 1
    )


def columns(node: fx.Node) -> tuple[fx.Node, range] | None:
    """(x, which columns of its last axis) of a slice, or of an item of chunk or split."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, fx.Node):
        return None
    if is_call(node, operator.getitem):
        x, index = source.args[0], node.args[1]
        if not is_call(source, *_SPLITS) or not isinstance(x, fx.Node):
            return None
        if not is_last_axis(x, argument(source, "dim")) or not isinstance(index, int):
            return None
        widths = [int(part.shape[-1]) for part in source.meta["val"]]
        return x, range(sum(widths[:index]), sum(widths[: index + 1]))
    if not is_call(node, aten.slice.Tensor) or not is_last_axis(source, argument(node, "dim")):
        return None
    width = shape_of(source)[-1]
    start, end, step = (argument(node, name) for name in ("start", "end", "step"))
    if not isinstance(width, int) or not all(isinstance(v, int | None) for v in (start, end, step)):
        return None
    return source, range(*slice(start, end, step).indices(width))


def emit_once(
    builder: GraphBuilder,
    reader: fx.Node,
    target: torch._ops.OpOverload,
    operand: fx.Node,
    *rest: int,
) -> fx.Node:
    """`target(operand, *rest)` for use at `reader`: the call that is there already, or a new one
    right behind the operand, where later sites find it."""
    args: tuple[Argument, ...] = (operand, *rest)
    for user in operand.users:
        if is_call(user, target) and user.args == args and not user.kwargs and user < reader:
            return user
    place = operand.next
    while place.op == "placeholder":
        place = place.next
    with builder.at(place):
        return builder.emit(target, args, like=[operand])
