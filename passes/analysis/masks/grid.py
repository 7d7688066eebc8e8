"""A second, independent test of a mask's meaning: computed on small grids and compared.

The nodes between the product and the softmax are run as they are, with random scores in place of
the product, random padding bits and small sizes; the probabilities must equal those that the
op's arguments give, also of queries that see nothing. Sizes straddle the window, where off-by-one
errors show.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.graph import Graph, argument, dtype_of, is_call
from graphopt.ops.attention import Masks, softmax
from graphopt.passes.analysis.masks.meaning import MaskMeaning

_LARGEST = 600
_MOST_NODES = 400
_SEEN = 1e-20
_TOLERANCE, _TOLERANCE_LOW = 1e-4, 3e-2


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is compared. last: the softmax's input, or an SDPA mask (then `product` is None).

    like: sizes of the scores. factor: op and node of what else multiplies or divides the product.
    residue: the mask operand is what `last` is for a product of zero.
    is_safe: rows of -inf alone give zeros, not nan.
    """

    last: fx.Node
    product: fx.Node | None
    like: Sequence[int | torch.SymInt]
    scale: float
    softcap: float
    is_safe: bool
    factor: tuple[str, fx.Node] | None = None
    residue: bool = False


def agrees(graph: Graph, candidate: Candidate, meaning: MaskMeaning) -> bool:
    """True when every grid agrees, or when the mask's nodes cannot be run on their own."""
    wanted = [candidate.last, *meaning.padding, *meaning.hiding, *meaning.aux]
    if meaning.mask is not None:
        wanted.append(meaning.mask)
    if candidate.factor is not None:
        wanted.append(candidate.factor[1])
    nodes = _ancestors(wanted, candidate.product)
    if nodes is None or not all(_can_run(graph, node) for node in nodes):
        return True
    for size in (2, 5, meaning.window + 2):
        if size <= _LARGEST and not _agrees_at(graph, candidate, meaning, nodes, size):
            return False
    return True


def adds(product: fx.Node) -> bool:
    """A baddbmm that adds something to its product."""
    return is_call(product, torch.ops.aten.baddbmm.default) and argument(product, "beta") != 0


def _ancestors(wanted: Sequence[fx.Node], product: fx.Node | None) -> list[fx.Node] | None:
    seen: set[fx.Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node in seen or (node is product and not adds(node)):
            continue
        seen.add(node)
        if len(seen) > _MOST_NODES:
            return None
        # What a baddbmm adds is part of the chain, its product is not.
        stack.extend(node.all_input_nodes[:1] if node is product else node.all_input_nodes)
    return [n for n in wanted[0].graph.nodes if n in seen]


def _can_run(graph: Graph, node: fx.Node) -> bool:
    if node.op == "get_attr":
        data = graph.weights.get(str(node.target))
        return data is not None and data.device.type != "meta"
    if node.op == "placeholder":
        value = node.meta["val"]
        return isinstance(value, Tensor)
    return node.op == "call_function"


def _concrete(sizes: Sequence[int | torch.SymInt], symbols: Mapping[str, int]) -> list[int]:
    result = []
    for size in sizes:
        if isinstance(size, torch.SymInt):
            expression: Any = size.node.expr
            result.append(
                int(expression.subs({s: symbols[str(s)] for s in expression.free_symbols}))
            )
        else:
            result.append(int(size))
    return result


def _agrees_at(
    graph: Graph, candidate: Candidate, meaning: MaskMeaning, nodes: list[fx.Node], size: int
) -> bool:
    symbols: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            for position, length in enumerate(node.meta["val"].shape):
                if isinstance(length, torch.SymInt):
                    symbols.setdefault(str(length), 2 if position == 0 else size)
    generator = torch.Generator().manual_seed(size)
    try:
        shape = _concrete(candidate.like, symbols)
        scores = torch.randn(shape, generator=generator)
        if candidate.product is not None:
            # Small and with few bits, so that half precision rounds little.
            scores = (scores * 8).round().clamp(-16, 16) / 16
        seed = int(torch.randint(1 << 30, (), generator=generator))

        def run(product: Tensor) -> dict[fx.Node, Any]:
            drawn = generator.manual_seed(seed)
            values: dict[fx.Node, Any] = {}
            if candidate.product is not None:
                like = candidate.product.meta["val"]
                own = product.view(_concrete(like.shape, symbols))
                values[candidate.product] = own.to(like.dtype)
            for node in nodes:
                if node is candidate.product:
                    more = values[node.all_input_nodes[0]] * argument(node, "beta")
                    values[node] = values[node] + more
                else:
                    values[node] = _run(graph, node, values, symbols, drawn, meaning.bits)
            return values

        values = run(scores)
        last = values[candidate.last]
        padding = [values[node].bool().flatten(1) for node in meaning.padding]
        padding += [~values[node].bool().flatten(1) for node in meaning.hiding]
        aux = [values[node] for node in meaning.aux]
        mask = None if meaning.mask is None else values[meaning.mask]
        if candidate.residue:
            mask = run(torch.zeros_like(scores))[candidate.last].view(shape)
    except (RuntimeError, KeyError, IndexError, TypeError):
        # The example's sizes are not free to change (a buffer that is too small, a fixed batch).
        return True
    working = torch.promote_types(last.dtype, torch.float32)
    if candidate.product is not None:
        expected = last.to(working)
    elif last.dtype == torch.bool:
        expected = scores.masked_fill(~last, float("-inf"))
    else:
        expected = scores + last
    pad_BT = torch.stack(padding).all(0) if padding else None
    b, h, queries, keys = [1] * (4 - len(shape)) + shape
    four = (b, h, queries, keys)
    masks = Masks(
        four,
        mask,
        pad_BT,
        aux,
        meaning.causal,
        meaning.window,
        meaning.predicate,
        meaning.bias,
        meaning.hidden,
    )
    found = scores.view(four).to(working) * (1.0 if candidate.product is None else candidate.scale)
    if candidate.factor is not None:
        op, node = candidate.factor
        found = found * values[node] if op == "mul" else found / values[node]
    if candidate.softcap:
        found = candidate.softcap * torch.tanh(found / candidate.softcap)
    weights = softmax(masks.applied(found, range(queries)), None, meaning.empty_is_nan)
    wanted = softmax(expected.view(four), None, not candidate.is_safe)
    if not torch.equal(weights.isnan(), wanted.isnan()):
        return False
    weights, wanted = weights.nan_to_num(), wanted.nan_to_num()
    # Clearly seen by one and hidden by the other; far-off keys of a bias may vanish in either.
    is_same = not bool(
        ((weights > _SEEN) & (wanted == 0) | (weights == 0) & (wanted > _SEEN)).any()
    )
    compared = candidate.last if candidate.product is None else candidate.product
    low = dtype_of(compared) in (torch.bfloat16, torch.float16)
    limit = _TOLERANCE_LOW if low else _TOLERANCE
    return is_same and bool((weights - wanted).abs().max() <= limit)


def _run(
    graph: Graph,
    node: fx.Node,
    values: dict[fx.Node, Any],
    symbols: Mapping[str, int],
    generator: torch.Generator,
    bits: Collection[str],
) -> Any:
    value = node.meta["val"]
    if node.op == "get_attr":
        return graph.weights[str(node.target)]
    if node.op == "placeholder":
        shape = _concrete(value.shape, symbols)
        if value.is_floating_point():
            return torch.randn(shape, generator=generator).to(value.dtype)
        highest = 2 if str(node.target) in bits or value.dtype == torch.bool else 4
        made = torch.randint(0, highest, shape, generator=generator)
        # Of a padding mask: the first batch element sees nothing, the second its first key.
        made[:1], made[1:, ..., :1] = 0, 1
        return made.to(value.dtype)
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    assert callable(node.target)
    return node.target(*args, **kwargs)
