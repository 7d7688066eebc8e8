"""What the model adds to its scores, as a tensor: its own ops run on scores of zero.

Where the scores are scale * S + bias (or capped first) and no node holds the bias, the ops between
the product and the softmax are emitted once more with zeros for the product. They give the bias in
the shape of the scores, hidden keys included: a dense mask of the attention op.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.node import map_arg

from graphopt.ir.builder import GraphBuilder
from graphopt.ir.graph import argument, shape_of
from graphopt.passes.analysis.masks.grid import adds
from graphopt.passes.fuse.attention.operands import is_tensor

aten = torch.ops.aten


def between(product: fx.Node, scores: fx.Node) -> list[fx.Node]:
    """The ops that lead from the product to the scores, in order; the product left out."""
    above: set[fx.Node] = set()
    stack = list(product.users)
    while stack:
        node = stack.pop()
        if node not in above:
            above.add(node)
            stack.extend(node.users)
    needed: set[fx.Node] = set()
    stack = [scores]
    while stack:
        node = stack.pop()
        if node in above and node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return [node for node in product.graph.nodes if node in needed]


def can_emit(product: fx.Node) -> bool:
    """Whether every size of the product is one of an operand's."""
    return all(_source(product, size) is not None for size in shape_of(product))


def emit_residue(builder: GraphBuilder, product: fx.Node, scores: fx.Node) -> fx.Node:
    """The scores without the product."""
    sizes: list[int | fx.Node] = []
    for size in shape_of(product):
        found: int | tuple[fx.Node, int] | fx.Node | None = _source(product, size)
        assert found is not None
        if isinstance(found, tuple):
            found = builder.emit(aten.sym_size.int, found, like=[product])
        sizes.append(found)
    operand = next(node for node in product.all_input_nodes if is_tensor(node))
    zero = builder.emit(aten.new_zeros.default, [operand, sizes], like=[product])
    if adds(product):
        more, beta = product.args[0], argument(product, "beta")
        if beta != 1:
            more = builder.emit(aten.mul.Scalar, [more, beta], like=[product])
        zero = builder.emit(aten.add.Tensor, [zero, more], like=[product])
    copies = {product: zero}
    for node in between(product, scores):
        args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: copies.get(n, n))
        copies[node] = builder.copy(node, args, kwargs)
    return copies[scores]


def _source(product: fx.Node, size: int | torch.SymInt) -> int | tuple[fx.Node, int] | None:
    """A number, or the operand and axis whose size it is."""
    if isinstance(size, int):
        return size
    for node in product.all_input_nodes:
        if is_tensor(node):
            for axis, own in enumerate(shape_of(node)):
                if str(own) == str(size):
                    return node, axis
    return None
