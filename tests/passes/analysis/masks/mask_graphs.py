"""Graphs of mask ops without a model, and expressions of the index algebra computed on grids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from helpers.op_graph import OpGraph
from torch import Tensor, fx

from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks.algebra import Expr
from graphopt.passes.analysis.masks.meaning import reader

FLOAT_CALLS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "min": torch.minimum,
    "max": torch.maximum,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "eq": torch.eq,
    "ne": torch.ne,
    "abs": torch.abs,
    "tanh": torch.tanh,
    "log": torch.log,
    "int_mul": torch.mul,
    "int_min": torch.minimum,
    "int_max": torch.maximum,
    "same": torch.eq,
    "not": torch.logical_not,
    "magnitude": torch.abs,
    "narrow": Tensor.double,
}


class MaskGraph(OpGraph):
    """What the algebra reads of a graph, and what that computes."""

    def read(self, node: fx.Node) -> Expr:
        """The algebra's view of a node."""
        return reader(self.graph).of(node).element

    def read_over(self, node: fx.Node, shape: Sequence[int]) -> Expr:
        """The same of a node that is broadcast to `shape`."""
        element = reader(self.graph).element(node, tuple(map(ia.integer, shape)))
        assert element is not None
        return element

    def computed(self, e: Expr, shape: Sequence[int]) -> Tensor:
        """`e` on the grid of `shape`, in float64 where it is a float."""
        variables: dict[str, Tensor] = {}
        for i, size in enumerate(shape):
            view = [1] * len(shape)
            view[i] = size
            variables[f"a{i}"] = torch.arange(size).view(view)
        named = {node.name: value for node, value in self.values.items()}
        return _value(e, variables, named).expand(tuple(shape))

    def assert_read(self, node: fx.Node, opaque: bool = False) -> Expr:
        """What is read of a node is what torch computes; opaque: reading itself is fine."""
        wanted, element = self.values[node], self.read(node)
        found = self.computed(element, wanted.shape)
        kind = "bool" if wanted.dtype == torch.bool else "float"
        if kind == "bool":
            assert ia.kind_of(element) == "bool"
        assert torch.allclose(found.double(), wanted.double(), 1e-5, 1e-6, equal_nan=True), element
        is_itself = any(read.tensor == node.name for read in ia.reads(element))
        assert opaque or not is_itself, f"{node.target} was not read"
        return element


def _value(e: Expr, variables: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    def value(part: Expr) -> Tensor:
        return _value(part, variables, tensors)

    if isinstance(e, ia.Num):
        is_float = e.kind == "float"
        return torch.tensor(e.value, dtype=torch.float64 if is_float else None)
    if isinstance(e, ia.Var):
        return variables[e.name]
    if isinstance(e, ia.Sum):
        return sum((value(a) * c for a, c in e.terms), torch.tensor(e.constant))
    if isinstance(e, ia.Read):
        return _element(tensors[e.tensor], [value(i) for i in e.indices])
    args = [value(a) for a in e.args]
    if e.op == "ge0":
        return args[0] >= 0
    if e.op == "eq0":
        return args[0] == 0
    if e.op == "floordiv":
        return torch.div(args[0], args[1], rounding_mode="floor")
    if e.op == "where":
        return torch.where(*args)
    if e.op == "float":
        return args[0].double()
    if e.op in ("and", "or"):
        combine = torch.logical_and if e.op == "and" else torch.logical_or
        result = args[0]
        for arg in args[1:]:
            result = combine(result, arg)
        return result
    return FLOAT_CALLS[e.op](*args)


def _element(tensor: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """Elements; outside of the tensor, where a condition must not look, what is never right."""
    if not indices:
        return tensor.double() if tensor.is_floating_point() else tensor
    sizes = zip(indices, tensor.shape, strict=True)
    inside = torch.stack(torch.broadcast_tensors(*((i >= 0) & (i < n) for i, n in sizes))).all(0)
    clamped = (i.clamp(0, n - 1) for i, n in zip(indices, tensor.shape, strict=True))
    found = tensor[tuple(clamped)]
    if tensor.dtype == torch.bool:
        assert inside.all()
        return found
    found = found.double() if tensor.is_floating_point() else found
    return torch.where(inside, found, 987654)
