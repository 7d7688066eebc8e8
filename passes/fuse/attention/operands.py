"""Operands of a hand-written attention: layouts, repeated heads, scales and casts taken off.

Products are `matmul`, `bmm`, `baddbmm` and two-operand `einsum`. An Operand is a node and the view
ops that bring it to `[batch, heads, tokens, width]`; nothing is emitted while matching.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.builder import GraphBuilder
from graphopt.ir.graph import Graph, argument, axis_of, dtype_of, is_call, shape_of
from graphopt.passes.fuse.walk import CASTS

aten = torch.ops.aten
PRODUCTS = (
    aten.matmul.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.einsum.default,
)
COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default)
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_MULTIPLY = (aten.mul.Tensor, aten.mul.Scalar)
_SCALE = (*_MULTIPLY, aten.div.Tensor, aten.div.Scalar)
FLATTEN = (aten.flatten.using_ints,)


@dataclass(frozen=True, slots=True)
class Operand:
    """`node` through `steps`, (op, further arguments) each, is `[B, H, S, D]`."""

    node: fx.Node
    steps: tuple[tuple[Any, tuple[Any, ...]], ...] = ()

    def emit(self, builder: GraphBuilder) -> fx.Node:
        """The node in its layout."""
        node = self.node
        for op, arguments in self.steps:
            node = builder.emit(op, [node, *arguments], like=[node])
        return node

    @property
    def shape(self) -> tuple[str, ...]:
        """Sizes after the steps, as text."""
        sizes = [str(size) for size in shape_of(self.node)]
        for op, arguments in self.steps:
            if op is aten.permute.default:
                sizes = [sizes[i] for i in arguments[0]]
            elif op is aten.transpose.int:
                a, b = arguments
                sizes[a], sizes[b] = sizes[b], sizes[a]
            elif op is aten.unflatten.int:
                sizes[arguments[0] :] = map(str, arguments[1])
            else:
                assert op is aten.unsqueeze.default, op
                sizes.insert(arguments[0], "1")
        return tuple(sizes)

    def then(self, op: Any, *arguments: Any) -> Operand:
        """One more step."""
        return replace(self, steps=(*self.steps, (op, arguments)))


@dataclass(frozen=True, slots=True)
class Product:
    """left @ right of heads. order: axes of the result in terms of [b, h, row, column], None when
    they are that. alpha: factor of a baddbmm."""

    left: Operand
    right: Operand
    order: tuple[int, ...] | None = None
    alpha: float = 1.0


def first(node: fx.Node) -> fx.Node:
    """The first operand."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand


def scalar(graph: Graph, value: Any) -> float | None:
    """The number that an operand is: a number, or a constant tensor of one element."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, fx.Node) and value.op == "get_attr":
        data = graph.weights.get(str(value.target))
        if data is not None and data.numel() == 1 and data.device.type != "meta":
            return float(data.item())
    return None


def unscaled(graph: Graph, operand: Operand) -> tuple[Operand, float]:
    """The operand before multiplications by numbers, casts to wider floats, and copies."""
    node, factor = operand.node, 1.0
    while node.op == "call_function":
        number = scalar(graph, node.args[1]) if is_call(node, *_SCALE) else None
        if number == 0.0:
            break
        if number is not None and isinstance(node.args[0], fx.Node):
            if dtype_of(node) != dtype_of(first(node)):
                break
            factor *= number if is_call(node, *_MULTIPLY) else 1.0 / number
        elif not is_call(node, *COPIES) and not _widens(node):
            break
        node = first(node)
    return replace(operand, node=node), factor


def _widens(node: fx.Node) -> bool:
    if not is_call(node, *CASTS):
        return False
    old, new = dtype_of(first(node)), dtype_of(node)
    floats = old.is_floating_point and new.is_floating_point
    return floats and old.itemsize <= new.itemsize


def transposed(operand: Operand) -> Operand:
    """Last two axes swapped; a swap that is there is taken off."""
    node = operand.node
    if operand.steps and operand.steps[-1] == (aten.transpose.int, (-1, -2)):
        return replace(operand, steps=operand.steps[:-1])
    if not operand.steps and is_call(node, aten.transpose.int):
        rank = len(shape_of(node))
        if {axis_of(argument(node, d), rank) for d in ("dim0", "dim1")} == {rank - 1, rank - 2}:
            return Operand(first(node))
    return operand.then(aten.transpose.int, -1, -2)


def unrepeated(operand: Operand) -> Operand:
    """Keys or values before their heads were repeated for the query heads."""
    heads = _head_axis(operand)
    node = operand.node
    if heads is None or len(shape_of(node)) != 4:
        return operand
    if is_call(node, aten.repeat_interleave.self_int):
        is_heads = int(argument(node, "dim")) % 4 == heads
        return replace(operand, node=first(node)) if is_heads else operand
    if is_call(node, aten.expand.default):
        base = first(node)
        is_single = len(shape_of(base)) == 4 and shape_of(base)[heads] == 1
        others = [axis for axis in range(4) if axis != heads]
        same = all(str(shape_of(base)[a]) == str(shape_of(node)[a]) for a in others if is_single)
        return replace(operand, node=base) if is_single and same else operand
    base_of = _before_expand(node, heads)
    return operand if base_of is None else replace(operand, node=base_of)


def _head_axis(operand: Operand) -> int | None:
    """Which axis of the node becomes axis 1; None when that is not plain."""
    order = [0, 1, 2, 3]
    for op, arguments in operand.steps:
        if op is aten.permute.default:
            order = [order[i] for i in arguments[0]]
        elif op is aten.transpose.int and arguments == (-1, -2):
            order[2], order[3] = order[3], order[2]
        else:
            return None
    return order[1]


def _before_expand(node: fx.Node, heads: int) -> fx.Node | None:
    """x of `x.unsqueeze(heads + 1).expand(...).reshape(...)`: every head several times in a row."""
    if not is_call(node, *VIEWS, *FLATTEN):
        return None
    expand = first(node)
    while is_call(expand, *COPIES):
        expand = first(expand)
    if not is_call(expand, aten.expand.default) or len(shape_of(expand)) != 5:
        return None
    inserted, wide, count = first(expand), shape_of(expand), shape_of(node)[heads]
    if len(shape_of(inserted)) != 5 or shape_of(inserted)[heads + 1] != 1:
        return None
    base = _without_axis(inserted, heads + 1)
    if base is None or not isinstance(count, int) or count != wide[heads] * wide[heads + 1]:
        return None
    others = [axis for axis in range(4) if axis != heads]
    same = all(str(shape_of(base)[axis]) == str(shape_of(node)[axis]) for axis in others)
    return base if same and dtype_of(base) == dtype_of(node) else None


def _without_axis(node: fx.Node, axis: int) -> fx.Node | None:
    """x of `x.unsqueeze(axis)` and of `x[:, :, None]`, slices that keep everything aside."""
    while is_call(node, aten.slice.Tensor) and str(shape_of(node)) == str(shape_of(first(node))):
        node = first(node)
    if is_call(node, aten.unsqueeze.default) and int(argument(node, "dim")) % 5 == axis:
        return first(node)
    return None


def read_product(graph: Graph, node: fx.Node, left_is: fx.Node | None = None) -> Product | None:
    """The two operands of a product of heads; None for other layouts.

    left_is: for probabilities @ values: the operand that must be the left one.
    """
    if is_call(node, aten.einsum.default):
        return _einsum(node, left_is)
    alpha = 1.0
    if is_call(node, aten.baddbmm.default):
        a, b = node.args[1:3]
        found = scalar(graph, argument(node, "alpha"))
        if found is None:
            return None
        alpha = found
    else:
        a, b = node.args[:2]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    if left_is is not None and a is not left_is:
        return None
    if len(shape_of(a)) != len(shape_of(b)) or len(shape_of(a)) not in (3, 4):
        return None
    return Product(Operand(a), Operand(b), None, alpha)


def _einsum(node: fx.Node, left_is: fx.Node | None) -> Product | None:
    equation, tensors = argument(node, "equation").replace(" ", ""), list(argument(node, "tensors"))
    inputs, arrow, out = equation.partition("->")
    letters = inputs.split(",")
    if len(tensors) != 2 or not arrow or "." in equation or len(out) not in (3, 4):
        return None
    if left_is is not None:
        if left_is not in tensors or tensors[0] is tensors[1]:
            return None
        if len(letters[tensors.index(left_is)]) != len(out):
            return None
        if tensors[1] is left_is:
            letters, tensors = letters[::-1], tensors[::-1]
        *shared, row, summed = letters[0]
        column = next((x for x in letters[1] if x not in letters[0]), "")
    else:
        *shared, row, column = out
        if row not in letters[0]:
            letters, tensors = letters[::-1], tensors[::-1]
        summed = next((x for x in letters[0] if x not in out), "")
    both = "".join(shared)
    left_order, right_order = both + row + summed, both + summed + column
    if sorted(letters[0]) != sorted(left_order) or sorted(out) != sorted(both + row + column):
        return None
    if len(set(both + row + column + summed)) != len(out) + 1 or set(letters[1]) - set(right_order):
        return None
    if not {summed, column, shared[0]} <= set(letters[1]):
        return None
    left = _ordered(Operand(tensors[0]), letters[0], left_order)
    right = _ordered(Operand(tensors[1]), letters[1], right_order)
    axes = both + row + column
    order = tuple(axes.index(letter) for letter in out)
    if len(out) == 3 and order != (0, 1, 2):
        return None
    return Product(left, right, None if order == tuple(range(len(out))) else order)


def _ordered(operand: Operand, letters: str, order: str) -> Operand:
    """Permuted to `order`; a missing axis (heads of multi-query attention) gets size 1."""
    present = [letter for letter in order if letter in letters]
    permutation = [letters.index(letter) for letter in present]
    if permutation == [0, 2, 1]:
        operand = operand.then(aten.transpose.int, -1, -2)
    elif permutation != sorted(permutation):
        operand = operand.then(aten.permute.default, permutation)
    for position, letter in enumerate(order):
        if letter not in letters:
            operand = operand.then(aten.unsqueeze.default, position)
    return operand


def is_tensor(value: Any) -> bool:
    """True for a node that holds a tensor."""
    return isinstance(value, fx.Node) and isinstance(value.meta["val"], Tensor)


def is_size(node: fx.Node) -> bool:
    """True for a node that only reads a size."""
    return isinstance(node.meta.get("val"), (int, torch.SymInt))
