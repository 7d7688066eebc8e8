"""The nodes of a mask subgraph as index algebra: what one element of each is.

`MaskValues(graph, RULES, fallback).of(node)` gives a Grid: the sizes of the node's axes and one
expression in the axis variables a0, a1, ... Everything that is not arithmetic of indices, constants
and bits is a `Read` of the node itself, so that reading never fails; nodes of the model proper end
up as that. `baddbmm` is what it adds plus a `Read` of its product, which has a name of its own.

Constants are read by `constants.py`. What is read holds for every value of the inputs; `bits.py` is
where one is assumed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.graph import Graph, argument, dtype_of, is_call
from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks.algebra import Expr, Var
from graphopt.passes.analysis.masks.constants import read_constant

aten = torch.ops.aten
# Integers up to here are exact in float32.
_EXACT = (torch.float32, torch.float64)
PRODUCT = ".product"
"""Behind the name of a baddbmm: its product without what it adds. No node has such a name."""
_NARROW = (torch.int8, torch.uint8, torch.int16)


@dataclass(frozen=True, slots=True)
class Grid:
    """A tensor as a function: sizes of its axes, and an element in terms of a0, a1, ..."""

    sizes: tuple[Expr, ...]
    element: Expr


def axis(i: int) -> Var:
    """The variable of axis i."""
    return Var(f"a{i}")


def size_expr(value: Any) -> Expr:
    """A size, as a linear sum of named sizes where it is one."""
    if not isinstance(value, torch.SymInt):
        return ia.integer(int(value))
    expression: Any = value.node.expr
    total: Expr = ia.integer(0)
    for part in expression.as_ordered_terms():
        coefficient, rest = part.as_coeff_Mul()
        if not coefficient.is_integer:
            return Var(str(expression), size=True)
        atom = ia.integer(1) if rest == 1 else Var(str(rest), size=True)
        total = ia.add(total, atom, int(coefficient))
    return total


def kind(dtype: torch.dtype) -> str:
    """bool, int or float."""
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "int"


class MaskValues:
    """Reads masks of one graph by `rules` (op -> rule) and, where an op has none or its rule knows
    nothing, by `fallback`; remembers what it has read."""

    def __init__(self, graph: Graph, rules: Mapping[object, Rule], fallback: Rule) -> None:
        self.graph, self.rules, self.fallback = graph, rules, fallback
        self._known: dict[fx.Node, Grid] = {}

    def of(self, node: fx.Node) -> Grid:
        """What an element of `node` is."""
        if node not in self._known:
            # A cycle cannot occur; the entry makes deep recursion stop at unfinished nodes.
            self._known[node] = self._opaque(node)
            found = self._read(node)
            if found is not None:
                self._known[node] = found
        return self._known[node]

    def nodes(self) -> list[fx.Node]:
        """Every node read so far."""
        return list(self._known)

    def named(self, tensor: str) -> fx.Node | None:
        """The node that a `Read` names, or whose product it names."""
        name = tensor.removesuffix(PRODUCT)
        return next((node for node in self.graph.nodes if node.name == name), None)

    def operand(self, value: Any) -> Grid | None:
        """A node or a number."""
        if isinstance(value, fx.Node):
            return self.of(value)
        if isinstance(value, (bool, int, float)):
            return Grid((), ia.number(value))
        return None

    def element(self, value: Any, sizes: Sequence[Expr]) -> Expr | None:
        """The element of an operand that is broadcast to `sizes`."""
        grid = self.operand(value)
        if grid is None or len(grid.sizes) > len(sizes):
            return None
        shift = len(sizes) - len(grid.sizes)
        return ia.substitute(
            grid.element,
            {
                axis(i): ia.integer(0) if size == ia.integer(1) else axis(i + shift)
                for i, size in enumerate(grid.sizes)
            },
        )

    def _opaque(self, node: fx.Node) -> Grid:
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            is_size = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
            return Grid((), size_expr(value) if is_size else ia.Read(node.name, (), "float"))
        sizes = tuple(map(size_expr, value.shape))
        one = ia.integer(1)
        indices = tuple(ia.integer(0) if s == one else axis(i) for i, s in enumerate(sizes))
        return Grid(sizes, ia.Read(node.name, indices, kind(value.dtype)))

    def _read(self, node: fx.Node) -> Grid | None:
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            return None
        sizes = tuple(map(size_expr, value.shape))
        if node.op == "get_attr":
            data = self.graph.weights.get(str(node.target))
            constant = None if data is None else read_constant(data)
            return None if constant is None else Grid(sizes, constant)
        if node.op != "call_function":
            return None
        if node.target is operator.getitem:
            return None
        rule = self.rules.get(node.target, self.fallback)
        element = rule(self, node, sizes)
        if element is None:
            element = self.fallback(self, node, sizes)
        return None if element is None else Grid(sizes, element)

    def may_be_bits(self, read: Expr) -> bool:
        """An element of an integer input [batch, sequence] that is never embedded: most likely a
        padding mask, which holds zeros and ones."""
        if not isinstance(read, ia.Read) or read.kind != "int" or len(read.indices) != 2:
            return False
        node = self.named(read.tensor)
        if node is None or node.op != "placeholder":
            return False
        return not any(is_call(user, aten.embedding.default) for user in node.users)


Rule = Callable[[MaskValues, fx.Node, tuple[Expr, ...]], "Expr | None"]


def as_kind(values: MaskValues, e: Expr, wanted: str, dtype: torch.dtype) -> Expr | None:
    """The expression converted to bool, int or float."""
    own = ia.kind_of(e)
    if own == wanted:
        return None if _rounds(e, dtype) else e
    if isinstance(e, ia.Call) and e.op == "where":
        condition, *leaves = e.args
        converted = [as_kind(values, leaf, wanted, dtype) for leaf in leaves]
        if converted[0] is None or converted[1] is None:
            return None
        return ia.choose(condition, converted[0], converted[1])
    if isinstance(e, ia.Num):
        cast = {"bool": bool, "int": int, "float": float}[wanted]
        is_finite = math.isfinite(float(e.value))
        return ia.number(cast(e.value)) if is_finite or wanted != "int" else None
    if own == "bool":
        one, zero = (ia.integer(1), ia.integer(0)) if wanted == "int" else (ia.real(1), ia.real(0))
        return ia.choose(e, one, zero)
    if wanted == "bool":
        if own == "int":
            return ia.negate(ia.equal(e, ia.integer(0)))
        return ia.Call("ne", (e, ia.real(0.0)))
    if wanted == "float" and dtype in _EXACT:
        return ia.Call("float", (e,))
    # Few bits hold small integers: of use where the element is known to be one.
    return ia.Call("narrow", (e,)) if wanted == "float" and isinstance(e, ia.Read) else None


def _rounds(e: Expr, dtype: torch.dtype) -> bool:
    """A conversion within one kind that may change values: counted positions in few bits."""
    if isinstance(e, ia.Num):
        return False
    if isinstance(e, ia.Call) and e.op == "where":
        return any(_rounds(leaf, dtype) for leaf in e.args[1:])
    if dtype in _NARROW:
        return True
    return dtype.is_floating_point and dtype not in _EXACT and _counts(e)


def _counts(e: Expr) -> bool:
    if isinstance(e, ia.Call):
        return e.op == "float" or any(_counts(a) for a in e.args)
    return False


def operands(
    values: MaskValues, node: fx.Node, sizes: tuple[Expr, ...], wanted: str | None = None
) -> list[Expr] | None:
    """The first two operands, broadcast, in a common kind."""
    found = []
    for operand in node.args[:2]:
        element = values.element(operand, sizes)
        if element is None:
            return None
        found.append(element)
    if wanted is None:
        kinds = {ia.kind_of(e) for e in found}
        wanted = "float" if "float" in kinds else "int" if "int" in kinds else "bool"
    return _in_kind(values, found, wanted, node)


def _in_kind(
    values: MaskValues, found: list[Expr], wanted: str, node: fx.Node
) -> list[Expr] | None:
    dtype = dtype_of(node)
    for operand in node.args[:2]:
        value = operand.meta["val"] if isinstance(operand, fx.Node) else None
        if isinstance(value, Tensor) and value.is_floating_point():
            dtype = value.dtype
    converted = [as_kind(values, e, wanted, dtype) for e in found]
    return None if any(e is None for e in converted) else [e for e in converted if e is not None]


def argument_or(node: fx.Node, name: str, default: Any) -> Any:
    """A schema argument, or the default where the schema has none of that name."""
    try:
        return argument(node, name)
    except KeyError:
        return default
