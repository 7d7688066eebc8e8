"""FLOPs and bytes of every call of a graph, at given sizes of its symbolic axes.

graphopt's own ops state their cost (`OpSpec.cost`). For ATen:

    matrix products, convolutions, attention   2 operations a multiply-add
    softmax, log_softmax                       5 an element (max, subtract, exp, sum, divide)
    other arithmetic                           1 an element of the largest operand or result
    data movement (copies, casts, indexing)    0
    views, sizes                               0, and no bytes

Bytes are what must be read and written at least once: operands and results. A lookup
(embedding, index_select, ...) reads the rows it returns, not its table. Where the layout of memory
decides whether something is copied (reshape, contiguous), it counts as a view.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from graphopt.ir.builder import type_key
from graphopt.ir.graph import Graph
from graphopt.ir.opset import nbytes, spec_of
from graphopt.ir.shapes import DTYPE_NAMES

aten = torch.ops.aten
BLOCK_SIZE = 16
"""Tokens in a block of the KV cache, for graphs that read one."""
_VIEWS = {
    aten.reshape, aten.contiguous, aten.flatten, aten.unflatten, aten.chunk, aten.unbind,
    aten.expand_as, aten.view_as, aten.lift_fresh_copy, aten.sym_size, aten.movedim,
}  # fmt: skip
_LOOKUPS = {aten.embedding: 0, aten.index_select: 0, aten.gather: 0, aten.index: 0}
_MOVES = {
    aten.clone, aten.copy, aten.cat, aten.stack, aten.to, aten._to_copy, aten.repeat,
    aten.repeat_interleave, aten.pad, aten.constant_pad_nd, aten.roll, aten.flip, aten.zeros,
    aten.ones, aten.full, aten.empty, aten.arange, aten.zeros_like, aten.ones_like, aten.full_like,
    aten.new_zeros, aten.new_ones, aten.new_full, aten.scalar_tensor, aten.tril, aten.triu,
}  # fmt: skip
_SOFTMAX = {aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax}
_CONVOLUTIONS = {aten.conv1d, aten.conv2d, aten.conv3d}
_OUR_MATRIX_OPS = ("graphopt.linear_wq", "graphopt.attention", "graphopt.paged_attention")


@dataclass(frozen=True, slots=True)
class NodeCost:
    """Cost of one call.

    unit: what does the arithmetic, as `Machine.peak` takes it: the dtype of the operands of a
    matrix product ("i8" for one whose inputs are rounded to int8), or "vector".
    """

    flops: float
    bytes: float
    unit: str = "vector"


def axis_sizes(batch: int, sequence: int) -> dict[str, int]:
    """Sizes of the axes that graphs name. In a serving graph each of `batch` requests brings
    `sequence` token rows of a context of the same length."""
    columns = -(-sequence // BLOCK_SIZE)
    return {
        "batch": batch,
        "sequence": sequence,
        "rows": batch * sequence,
        "requests": batch,
        "requests_plus_1": batch + 1,
        "logit_rows": batch,
        "block_columns": columns,
        "blocks": batch * columns,
        "block_size": BLOCK_SIZE,
    }


def graph_costs(graph: Graph, batch: int = 1, sequence: int = 512) -> dict[fx.Node, NodeCost]:
    """The cost of each call. Axes other than those of `axis_sizes` are `sequence` long."""
    concrete = _Concrete(graph, axis_sizes(batch, sequence), sequence)
    known: dict[Any, NodeCost] = {}
    costs = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), concrete.value)
        key = (node.target, type_key(args), type_key(kwargs))
        if key not in known:
            known[key] = call_cost(node.target, args, kwargs, concrete.value(node))
        costs[node] = known[key]
    return costs


def call_cost(
    target: object, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
) -> NodeCost:
    """The cost of one call on tensors of concrete sizes (their data are not read)."""
    spec = spec_of(target)
    if spec is not None:
        cost = spec.cost(*args, **kwargs)
        return NodeCost(float(cost.flops), float(cost.bytes), _our_unit(spec.name, args, kwargs))
    if not isinstance(target, torch._ops.OpOverload) or _is_view(target, args, result):
        return NodeCost(0.0, 0.0)
    packet = target.overloadpacket
    operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    traffic = float(nbytes(*operands, *results))
    if packet in _LOOKUPS:
        table = args[_LOOKUPS[packet]]
        rows = float(sum(t.numel() for t in results) * table.element_size())
        return NodeCost(0.0, traffic - float(nbytes(table)) + rows)
    if packet in _MOVES:
        return NodeCost(0.0, traffic)
    products = _products(packet, args, kwargs, result)
    if products is not None:
        return NodeCost(float(products), traffic, DTYPE_NAMES.get(operands[0].dtype, "f32"))
    largest = max((t.numel() for t in [*operands, *results]), default=0)
    return NodeCost(float(largest * (5 if packet in _SOFTMAX else 1)), traffic)


class _Concrete:
    """Fake values of a graph with numbers in place of symbols, on the meta device."""

    def __init__(self, graph: Graph, sizes: Mapping[str, int], other: int) -> None:
        self._sizes = {text: sizes.get(name, other) for text, name in graph.symbols.items()}
        self._other = other
        self._known: dict[sympy.Expr, int] = {}
        self._values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """What `node` computes."""
        if node not in self._values:
            self._values[node] = self._of(node.meta["val"])
        return self._values[node]

    def _of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            shape = [self._size(size) for size in value.shape]
            return torch.empty(shape, dtype=value.dtype, device="meta")
        if isinstance(value, (list, tuple)):
            return [self._of(item) for item in value]
        return self._size(value) if isinstance(value, torch.SymInt) else value

    def _size(self, size: int | torch.SymInt) -> int:
        if isinstance(size, int):
            return size
        expr = size.node.expr
        if expr not in self._known:
            numbers = {s: self._sizes.get(str(s), self._other) for s in expr.free_symbols}
            self._known[expr] = max(0, int(expr.subs(numbers)))
        return self._known[expr]


def _is_view(target: torch._ops.OpOverload, args: tuple[Any, ...], result: Any) -> bool:
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
        return True
    if target.overloadpacket is aten.to:
        return bool(args[0].dtype == result.dtype)
    # Results that the schema lets share memory with an operand: transpose, slice, expand, ...
    aliases = any(r.alias_info and not r.alias_info.is_write for r in target._schema.returns)
    return aliases or target.overloadpacket in _VIEWS


def _our_unit(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    if name not in _OUR_MATRIX_OPS:
        return "vector"
    return "i8" if kwargs.get("activation") == "int8" else DTYPE_NAMES.get(args[0].dtype, "f32")


def _products(
    packet: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
) -> float | None:
    """Operations of a matrix product, None for other ops."""
    if packet is aten.linear or packet is aten.matmul:
        return 2.0 * float(result.numel() * args[0].shape[-1])
    if packet in _CONVOLUTIONS:
        return 2.0 * float(result.numel() * math.prod(args[1].shape[1:]))
    if packet is aten.scaled_dot_product_attention:
        q_BHSD, k_BGTD, v_BGTE = args[:3]
        pairs = q_BHSD.shape[:-1].numel() * k_BGTD.shape[-2]
        return 2.0 * float(pairs * (q_BHSD.shape[-1] + v_BGTE.shape[-1]))
    formula: Callable[..., Any] | None = flop_registry.get(packet)
    return None if formula is None else float(formula(*args, **kwargs, out_val=result))
