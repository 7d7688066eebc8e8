"""A size of 1: proven to be the same program, or kept out of it.

torch traces with sizes of at least 2, so that `if n > 1:` is decided without a word. Where a model
asks such a question, it is captured once more with that size fixed at 1, and the two graphs are
compared call by call, every size of the first taken at 1. They may differ in what is the same for
one row alone: a causal flag of attention whose queries and keys are one token each, a mask that
hides nothing then (`idle_masks.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graphopt.capture.bounds import turned_by_one
from graphopt.capture.idle_masks import without_idle_mask
from graphopt.capture.size_decisions import Decisions
from graphopt.errors import CaptureError
from graphopt.ir.graph import Graph, argument, is_call
from graphopt.ir.limits import Limit
from graphopt.ops import attention

aten = torch.ops.aten

_CAUSAL: dict[object, tuple[str, str]] = {
    aten.scaled_dot_product_attention.default: ("is_causal", "attn_mask"),
    attention.SPEC.overload: ("causal", "mask"),
}


Axes = Mapping[str, Mapping[int, str]]
# They change nothing of a value that keeps its shape.
_WHOLE = (
    aten.slice.Tensor,
    aten.expand.default,
    aten.view.default,
    aten.reshape.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.clone.default,
)


def sizes_kept_from_one(
    graph: Graph,
    decisions: Decisions,
    limits: Sequence[Limit],
    call: Mapping[str, Any],
    axes: Axes,
    capture: Callable[[Mapping[str, Any], Axes], Graph],
) -> tuple[Limit, ...]:
    """A limit `size >= 2` for every size that the model treats otherwise when it is 1.

    limits: already known. call, axes: of the capture that made `graph`. capture: makes a graph
    of other ones.
    """
    kept = []
    causes = {
        name: Limit(name, ">=", 2, "op" if decision.is_assert else "branch", decision.source)
        for name, decision in turned_by_one(decisions, graph.symbols).items()
    }
    for node in graph.nodes:
        for name in _differing_axes(graph, node):
            causes.setdefault(name, Limit(name, ">=", 2, "op", node.meta["source"]))
    for name, limit in causes.items():
        if any(known.names == {name} and not known.holds({name: 1}) for known in limits):
            continue
        smaller = {
            argument: _cut(value, axes.get(argument, {}), name) for argument, value in call.items()
        }
        others = {
            argument: {axis: size for axis, size in named.items() if size != name}
            for argument, named in axes.items()
        }
        try:
            at_one = capture(smaller, others)
        except CaptureError:
            # The model takes no 1: an assert, or a shape that does not fit.
            kept.append(limit)
            continue
        if not is_same_at_one(graph, at_one, name):
            kept.append(limit)
    return tuple(kept)


def _cut(value: Any, named: Mapping[int, str], name: str) -> Any:
    for axis, size in named.items():
        if size == name:
            value = value.narrow(axis, 0, 1)
    return value.clone() if isinstance(value, Tensor) else value


def is_same_at_one(graph: Graph, at_one: Graph, name: str) -> bool:
    """True when `graph`, with the symbolic size called `name` taken as 1, calls what `at_one`
    calls, on the same values."""
    return _Comparison(graph, at_one, name).outputs_agree()


class _Comparison:
    def __init__(self, graph: Graph, at_one: Graph, name: str) -> None:
        self.graph, self.at_one = graph, at_one
        self.ours = {
            sympy.Symbol(text, integer=True, positive=True): (
                sympy.Integer(1) if size == name else sympy.Symbol(size)
            )
            for text, size in graph.symbols.items()
        }
        self.theirs = {
            sympy.Symbol(text, integer=True, positive=True): sympy.Symbol(size)
            for text, size in at_one.symbols.items()
        }
        self.agreed: set[tuple[fx.Node, fx.Node]] = set()

    def outputs_agree(self) -> bool:
        ours, theirs = self.graph.output_nodes, self.at_one.output_nodes
        names = [spec.name for spec in self.graph.inputs]
        if names != [spec.name for spec in self.at_one.inputs] or len(ours) != len(theirs):
            return False
        return all(self._agree(a, b) for a, b in zip(ours, theirs, strict=True))

    def _agree(self, ours: Any, theirs: Any) -> bool:
        """Iterative, since a graph is deeper than Python's stack."""
        waiting: list[tuple[Any, Any]] = [(ours, theirs)]
        while waiting:
            a, b = waiting.pop()
            a_size, b_size = self._size(a, self.ours), self._size(b, self.theirs)
            if a_size is not None or b_size is not None:
                if a_size is None or b_size is None or a_size != b_size:
                    return False
            elif isinstance(a, fx.Node) and isinstance(b, fx.Node):
                a, b = self._origin(a, self.ours), self._origin(b, self.theirs)
                if (a, b) in self.agreed:
                    continue
                self.agreed.add((a, b))
                if a.target != b.target:
                    idle = without_idle_mask(a, self._number)
                    if idle is not None:
                        waiting.append((idle, b))
                        continue
                if a.op != b.op or a.target != b.target or not self._shapes_agree(a, b):
                    return False
                if a.op == "call_function":
                    waiting += self._arguments(a, b)
            elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
                if len(a) != len(b):
                    return False
                waiting += list(zip(a, b, strict=True))
            elif type(a) is not type(b) or a != b:
                return False
        return True

    def _origin(self, node: fx.Node, names: Mapping[sympy.Symbol, sympy.Expr]) -> fx.Node:
        """The value itself, where `node` is all of it in the same shape."""
        while is_call(node, *_WHOLE):
            operand = node.args[0]
            assert isinstance(operand, fx.Node)
            shapes = [
                [self._size(size, names) for size in value.meta["val"].shape]
                for value in (node, operand)
            ]
            has_steps = is_call(node, aten.slice.Tensor) and argument(node, "step") != 1
            if shapes[0] != shapes[1] or has_steps:
                break
            node = operand
        return node

    def _shapes_agree(self, a: fx.Node, b: fx.Node) -> bool:
        ours, theirs = a.meta.get("val"), b.meta.get("val")
        if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
            return True
        return [self._size(size, self.ours) for size in ours.shape] == [
            self._size(size, self.theirs) for size in theirs.shape
        ]

    def _arguments(self, a: fx.Node, b: fx.Node) -> list[tuple[Any, Any]]:
        """The pairs of arguments that must agree."""
        ours, theirs = _bound(a), _bound(b)
        pairs = [(ours.get(key), theirs.get(key)) for key in {**ours, **theirs}]
        if is_call(a, *_CAUSAL):
            flag, mask = _CAUSAL[a.target]
            if ours.get(mask) is None and theirs.get(mask) is None and self._is_one_token(a):
                # One query sees one key either way.
                pairs = [
                    (ours.get(key), theirs.get(key)) for key in {**ours, **theirs}.keys() - {flag}
                ]
        return pairs

    def _is_one_token(self, node: fx.Node) -> bool:
        """True when queries and keys have one token each."""
        operands: Any = node.args[:2]
        return all(self._size(o.meta["val"].shape[-2], self.ours) == 1 for o in operands)

    def _number(self, node: fx.Node) -> int | None:
        size = self._size(node, self.ours)
        return int(size) if isinstance(size, sympy.Integer) else None

    def _size(self, value: Any, names: Mapping[sympy.Symbol, sympy.Expr]) -> sympy.Expr | None:
        """A size as an expression of names; None for a value that is no size."""
        if isinstance(value, fx.Node):
            value = value.meta.get("val")
            if isinstance(value, (Tensor, type(None))):
                return None
        if isinstance(value, torch.SymInt):
            by_text = {str(symbol): size for symbol, size in names.items()}
            expression = value.node.expr
            return sympy.simplify(
                expression.xreplace({s: by_text.get(str(s), s) for s in expression.free_symbols})
            )
        if isinstance(value, int) and not isinstance(value, bool):
            return sympy.Integer(value)
        return None


def _bound(node: fx.Node) -> dict[str, Any]:
    """Arguments by name, the defaults of the schema filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {**{str(index): value for index, value in enumerate(node.args)}, **node.kwargs}
    bound = {spec.name: argument(node, spec.name) for spec in node.target._schema.arguments}
    if is_call(node, aten.slice.Tensor) and bound["start"] is None:
        bound["start"] = 0
    return bound


def _differing_axes(graph: Graph, node: fx.Node) -> list[str]:
    """Names of the sizes that, where they are 1, give the node another shape than it says: an axis
    that a squeeze takes away, one that a slice of two or more does not fill."""
    if is_call(node, aten.slice.Tensor):
        sliced, axis, start, end, step = (
            argument(node, name) for name in ("self", "dim", "start", "end", "step")
        )
        size, claimed = sliced.meta["val"].shape[axis], node.meta["val"].shape[axis]
        if not isinstance(size, torch.SymInt) or not all(
            isinstance(bound, (int, type(None))) for bound in (start, end, step)
        ):
            return []
        first = size.node.expr.xreplace(
            dict.fromkeys(size.node.expr.free_symbols, sympy.Integer(1))
        )
        length = len(range(*slice(start, end, step).indices(int(first))))
        expected = sympy.sympify(
            claimed.node.expr if isinstance(claimed, torch.SymInt) else claimed
        )
        if expected.xreplace(dict.fromkeys(expected.free_symbols, sympy.Integer(1))) == length:
            return []
        return _names(graph, [size])
    if not is_call(node, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims):
        return []
    operand: Any = node.args[0]
    shape = operand.meta["val"].shape
    axes: Any = node.args[1] if len(node.args) > 1 else range(len(shape))
    return _names(graph, [shape[axis] for axis in ([axes] if isinstance(axes, int) else axes)])


def _names(graph: Graph, sizes: Sequence[Any]) -> list[str]:
    symbols = {
        str(symbol)
        for size in sizes
        if isinstance(size, torch.SymInt)
        for symbol in size.node.expr.free_symbols
    }
    return [name for text, name in graph.symbols.items() if text in symbols]
