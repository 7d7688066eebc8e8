"""Ways through the graph around a softmax: down to the values, up to the product."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.ir.graph import Graph, argument, axis_of, dtype_of, is_call, op_name, shape_of
from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks.values import MaskValues, axis, size_expr
from graphopt.passes.base import Reject
from graphopt.passes.fuse.attention.operands import (
    COPIES,
    PRODUCTS,
    VIEWS,
    Operand,
    first,
    is_size,
    is_tensor,
    read_product,
)
from graphopt.passes.fuse.walk import CASTS

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Down:
    """What follows the softmax: `last` = probabilities @ v."""

    last: fx.Node
    v: Operand
    order: tuple[int, ...] | None
    drops_sink: bool


def walk_down(graph: Graph, softmax: fx.Node) -> Down | Reject:
    """Follow the probabilities to their product with the values."""
    node, drops_sink = softmax, False
    while True:
        users = [u for u in node.users if not is_size(u)]
        if len(users) != 1 or users[0].op == "output":
            text = "the probabilities have other users, or are returned"
            return Reject("probabilities-used", text, softmax, "do not return attention weights")
        (user,) = users
        if is_call(user, *CASTS, *COPIES, *VIEWS, aten.expand.default):
            if is_call(user, *VIEWS) and not _only_folds(user):
                return _no_values(user)
            node = user
        elif is_call(user, aten.dropout.default):
            if argument(user, "train") and argument(user, "p"):
                text = "attention dropout is active"
                return Reject("dropout-on", text, user, "turn dropout off: model.eval()")
            node = user
        elif is_call(user, aten.slice.Tensor) and _drops_last(user):
            node, drops_sink = user, True
        elif is_call(user, *PRODUCTS):
            product = read_product(graph, user, left_is=node)
            if product is None or product.alpha != 1.0 or is_call(user, aten.baddbmm.default):
                return _no_values(user)
            return Down(user, product.right, product.order, drops_sink)
        else:
            return _no_values(user)


def _only_folds(view: fx.Node) -> bool:
    """A view that folds heads into the batch or back: queries and keys stay apart."""
    old, new = shape_of(first(view)), shape_of(view)
    return {len(old), len(new)} <= {3, 4} and list(map(str, old[-2:])) == list(map(str, new[-2:]))


def _no_values(user: fx.Node) -> Reject:
    text = f"expected a product with the values after the softmax, found {op_name(user)}"
    return Reject("no-value-product", text, user)


def _drops_last(node: fx.Node) -> bool:
    """x[..., :-1]"""
    rank = len(shape_of(node))
    if axis_of(argument(node, "dim"), rank) != rank - 1 or argument(node, "start") not in (0, None):
        return False
    whole, kept = size_expr(shape_of(first(node))[-1]), size_expr(shape_of(node)[-1])
    return ia.add(whole, kept, -1) == ia.integer(1)


def without_row_maximum(node: fx.Node) -> fx.Node:
    """x of `x - x.max(-1, keepdim=True)`: the softmax is the same."""
    while is_call(node, *CASTS):
        node = first(node)
    if not is_call(node, aten.sub.Tensor) or argument(node, "alpha") != 1:
        return node
    x, peak = node.args[:2]
    if not isinstance(x, fx.Node) or not isinstance(peak, fx.Node):
        return node
    if is_call(peak, operator.getitem) and peak.args[1] == 0:
        peak = first(peak)
    if not is_call(peak, aten.amax.default, aten.max.dim) or first(peak) is not x:
        return node
    dims = argument(peak, "dim")
    rank = len(shape_of(x))
    is_last = [axis_of(d, rank) for d in (dims if isinstance(dims, (list, tuple)) else [dims])] == [
        rank - 1
    ]
    return x if is_last and argument(peak, "keepdim") else node


def read_sinks(values: MaskValues, node: fx.Node) -> tuple[fx.Node, Operand] | None:
    """(scores, sinks) of `cat([scores, sinks of each head], -1)`."""
    if not is_call(node, aten.cat.default) or len(argument(node, "tensors")) != 2:
        return None
    rank = len(shape_of(node))
    scores, sinks = argument(node, "tensors")
    if axis_of(argument(node, "dim"), rank) != rank - 1 or shape_of(sinks)[-1] != 1:
        return None
    element = values.of(sinks).element
    if not isinstance(element, ia.Read):
        return None
    varying = [index for index in element.indices if ia.variables(index)]
    base = values.named(element.tensor)
    if base is None or varying != [axis(rank - 3)]:
        return None
    operand = Operand(base)
    return scores, operand if len(element.indices) == 1 else operand.then(
        aten.reshape.default, [-1]
    )


def leads_to(values: MaskValues, name: str, product: fx.Node) -> bool:
    node = values.named(name)
    while node is not None and node is not product:
        node = first(node) if is_call(node, *VIEWS, *COPIES, *CASTS) else None
    return node is product


def products_below(values: MaskValues, scores: fx.Node) -> list[fx.Node]:
    """The products that the scores are made of; biases may be products too."""
    found: list[fx.Node] = []
    for read in sorted(ia.reads(values.of(scores).element), key=repr):
        node = values.named(read.tensor)
        while node is not None and is_call(node, *VIEWS, *COPIES, *CASTS):
            node = first(node)
        if node is not None and is_call(node, *PRODUCTS) and node not in found:
            found.append(node)
    return found


def used_elsewhere(product: fx.Node, softmax: fx.Node) -> fx.Node | None:
    """A user of the scores that does not lead to the softmax alone."""
    path: set[fx.Node] = set()
    stack = [first(softmax)]
    above = set()
    forward = [product]
    while forward:
        node = forward.pop()
        if node not in above and node is not softmax:
            above.add(node)
            forward.extend(node.users)
    while stack:
        node = stack.pop()
        if node in above and node not in path:
            path.add(node)
            stack.extend(node.all_input_nodes)
    for node in path:
        for user in node.users:
            if (
                user not in path
                and user is not softmax
                and (is_tensor(user) or user.op == "output")
            ):
                return user
    return None


def rounded(softmax: fx.Node, product: fx.Node, last: fx.Node) -> fx.Node | None:
    """The first value between the product and `last` that is coarser than both: the op would
    compute it as finely as they are."""
    allowed = max(torch.finfo(dtype_of(node)).eps for node in (product, last))
    above, below = [softmax], [user for user in softmax.users if user is not last]
    seen: set[fx.Node] = set()
    while above or below:
        node, is_above = (above.pop(), True) if above else (below.pop(), False)
        if node in seen or node is product or node.op == "output" or not is_tensor(node):
            continue
        seen.add(node)
        dtype = dtype_of(node)
        if dtype.is_floating_point and torch.finfo(dtype).eps > allowed:
            return node
        if is_above:
            above += [x for x in node.all_input_nodes if x is product or depends(x, product)]
        else:
            below += [user for user in node.users if user is not last]
    return None


def depends(node: fx.Node, product: fx.Node) -> bool:
    """True when `node` is computed from `product`."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current is product:
            return True
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return False
