"""Hand-written attention: from the softmax down to the values and up to the queries and keys."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from graphopt.ir.graph import Graph, argument, dtype_of, is_call, op_name, shape_of
from graphopt.passes.base import Reject
from graphopt.passes.fuse.attention_operands import (
    CASTS,
    COPIES,
    PRODUCTS,
    VIEWS,
    Operand,
    first,
    is_size,
    is_tensor,
    read_product,
    transposed,
    unfolded,
    unrepeated,
    unscaled,
)
from graphopt.passes.masks import algebra as ia
from graphopt.passes.masks.algebra import Expr
from graphopt.passes.masks.grid import Candidate, agrees
from graphopt.passes.masks.meaning import MaskMeaning, Unproven, read_meaning, reader
from graphopt.passes.masks.scores import HIDDEN, Unread, read_scores
from graphopt.passes.masks.values import MaskValues, axis, size_expr

aten = torch.ops.aten
Sizes = Sequence[int | torch.SymInt]


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """`last` computes attention(q, k, v). order: permutation of the result's axes. is_folded: the
    result is `[B * H, S, E]` of four axes. is_flat: operands and result have three axes.
    mask_is_inverted: the dense mask hides where true."""

    last: fx.Node
    q: Operand
    k: Operand
    v: Operand
    scale: float
    softcap: float
    sinks: Operand | None
    meaning: MaskMeaning
    order: tuple[int, ...] | None = None
    is_folded: bool = False
    is_flat: bool = False
    mask_is_inverted: bool = False

    @property
    def head_axis(self) -> int:
        """Where three axes get a fourth: heads apart, or heads of one batch where masks tell the
        first axis apart."""
        meaning = self.meaning
        is_masked = meaning.mask or meaning.padding or meaning.aux or self.sinks
        return 0 if is_masked or "h" in meaning.predicate else 1

    def dense(self, mask: fx.Node, why: str) -> AttentionSite:
        """With the mask as it is."""
        return replace(self, meaning=replace(MaskMeaning(), mask=mask, why_dense=why))


@dataclass(frozen=True, slots=True)
class _Down:
    """What follows the softmax: `last` = probabilities @ v."""

    last: fx.Node
    v: Operand
    order: tuple[int, ...] | None
    drops_sink: bool


def mask_sizes(sizes: Sizes) -> tuple[Expr, ...]:
    """Sizes of the scores as expressions, four of them."""
    own = tuple(map(size_expr, sizes))
    return (ia.integer(1),) * (4 - len(own)) + own


def proven(
    graph: Graph,
    site: AttentionSite,
    visible: Expr,
    bias: Expr | None,
    sizes: Sizes,
    candidate: Candidate | None,
    values: MaskValues | None = None,
) -> AttentionSite | Unproven:
    """The site with the meaning of a mask, proven and tested."""
    meaning = read_meaning(values or reader(graph), visible, bias, mask_sizes(sizes))
    if isinstance(meaning, Unproven):
        return meaning
    if candidate is not None and not agrees(graph, candidate, meaning):
        return Unproven("mask-check-failed", "the mask computes something else on a small grid")
    return replace(site, meaning=meaning)


def hand_written(graph: Graph, softmax: fx.Node) -> AttentionSite | Reject:
    """The attention around a softmax, or why it is none."""
    rank = len(shape_of(softmax))
    if int(argument(softmax, "dim")) % rank != rank - 1:
        text = "the softmax is not over the last axis"
        return Reject("softmax-axis", text, softmax, "put the keys on the last axis")
    down = _down(graph, softmax)
    if isinstance(down, Reject):
        return down
    if rank not in (3, 4):
        return Reject("not-heads", f"scores of {rank} axes", softmax, "use 3 or 4 axes")
    values = reader(graph)
    sinks: Operand | None = None
    scores = _without_row_maximum(first(softmax))
    if down.drops_sink:
        found = _sinks(values, scores)
        if found is None:
            return Reject("not-scores", "a column is dropped that is no sink", softmax)
        scores, sinks = found
    product = _product_below(values, scores)
    if product is None:
        return _no_product(scores)
    used = _used_elsewhere(product, softmax)
    if used is not None:
        text = f"the scores are also used by {op_name(used)}"
        return Reject("scores-used", text, used, "use the scores for nothing but the softmax")
    return _site(graph, values, down, scores, product, sinks)


def _site(
    graph: Graph,
    values: MaskValues,
    down: _Down,
    scores: fx.Node,
    product: fx.Node,
    sinks: Operand | None,
) -> AttentionSite | Reject:
    read = read_product(graph, product)
    if read is None or read.order is not None:
        return Reject("not-heads", "the product's operands are not tensors of heads", product)
    q, q_scale = unscaled(graph, read.left)
    k, k_scale = unscaled(graph, read.right)
    k, inner_scale = unscaled(graph, transposed(k))
    scale = read.alpha * q_scale * k_scale * inner_scale
    operands: list[Operand] = [q, k, _unwidened(graph, down.v)]
    is_folded = len(shape_of(product)) == 3 and len(shape_of(scores)) == 4
    if len(shape_of(product)) == 3:
        whole = [unfolded(operand) for operand in operands]
        if all(operand is not None for operand in whole):
            operands = [operand for operand in whole if operand is not None]
            is_folded = True
        elif is_folded:
            text = "heads are folded into the batch in a way that cannot be undone"
            return Reject("folded-heads", text, product, "use [batch, heads, sequence, width]")
    is_flat = len(shape_of(product)) == 3 and not is_folded
    q, q_scale = unscaled(graph, operands[0])
    k, k_scale = unscaled(graph, operands[1])
    k, inner_scale = unscaled(graph, unrepeated(k))
    scale *= q_scale * k_scale * inner_scale
    v = _unwidened(graph, unrepeated(_unwidened(graph, operands[2])))
    dtypes = {dtype_of(operand.node) for operand in (q, k, v)} | {dtype_of(down.last)}
    if len(dtypes) != 1:
        text = f"queries, keys, values and result have dtypes {sorted(map(str, dtypes))}"
        return Reject("dtype-mix", text, down.last, "use one dtype")
    site = AttentionSite(
        down.last, q, k, v, scale, 0.0, sinks, MaskMeaning(), down.order, is_folded, is_flat
    )
    return _masked(graph, values, site, scores, product)


def _unwidened(graph: Graph, v: Operand) -> Operand:
    """Values before casts to wider floats; a scale of the values stays where it is."""
    inner, factor = unscaled(graph, v)
    return inner if factor == 1.0 else v


def _masked(
    graph: Graph, values: MaskValues, site: AttentionSite, scores: fx.Node, product: fx.Node
) -> AttentionSite | Reject:
    """The site with scale, softcap and mask as the scores say; with a dense mask if need be."""
    found = _read(graph, values, site, scores, product)
    if isinstance(found, AttentionSite):
        return found
    peeled = _outer_mask(scores, product)
    if peeled is not None:
        inner, mask, is_inverted = peeled
        below = _read(graph, values, site, inner, product)
        if isinstance(below, AttentionSite) and below.meaning.mask is None:
            why = f"{found.code}: {found.text}"
            meaning = replace(below.meaning, mask=mask, why_dense=why)
            return replace(below, meaning=meaning, mask_is_inverted=is_inverted)
    return Reject(found.code, found.text, scores)


def _read(
    graph: Graph, values: MaskValues, site: AttentionSite, scores: fx.Node, product: fx.Node
) -> AttentionSite | Unproven | Unread:
    sizes = shape_of(scores)
    element = values.element(scores, mask_sizes(sizes))
    atoms = () if element is None else ia.reads(element)
    atom = next((r for r in atoms if _leads_to(values, r.tensor, product)), None)
    if element is None or atom is None:
        return Unread("not-scores", "the softmax is not over a product of queries and keys")
    parts = read_scores(element, atom)
    if isinstance(parts, Unread):
        return parts
    is_masked = parts.visible != ia.TRUE or parts.bias is not None
    by_head = axis(1) in ia.variables(parts.visible) or parts.bias is not None
    if site.is_folded and len(sizes) == 3 and is_masked and by_head:
        return Unread("folded-heads", "a mask over heads that are folded into the batch")
    if is_call(product, aten.baddbmm.default) and argument(product, "beta") != 0:
        return Unread("baddbmm-adds", "baddbmm adds its first operand to the scores")
    scaled = replace(site, scale=site.scale * parts.scale, softcap=parts.softcap)
    candidate = Candidate(scores, product, sizes, parts.scale, parts.softcap)
    return proven(graph, scaled, parts.visible, parts.bias, sizes, candidate, values)


def _down(graph: Graph, softmax: fx.Node) -> _Down | Reject:
    """Follow the probabilities to their product with the values."""
    node, drops_sink = softmax, False
    while True:
        users = [u for u in node.users if not is_size(u)]
        if len(users) != 1 or users[0].op == "output":
            text = "the probabilities have other users, or are returned"
            return Reject("probabilities-used", text, softmax, "do not return attention weights")
        (user,) = users
        if is_call(user, *CASTS, *COPIES, *VIEWS, aten.expand.default):
            if is_call(user, *VIEWS) and len(shape_of(user)) == 2:
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
            return _Down(user, product.right, product.order, drops_sink)
        else:
            return _no_values(user)


def _no_values(user: fx.Node) -> Reject:
    text = f"expected a product with the values after the softmax, found {op_name(user)}"
    return Reject("no-value-product", text, user)


def _drops_last(node: fx.Node) -> bool:
    """x[..., :-1]"""
    rank = len(shape_of(node))
    if int(argument(node, "dim")) % rank != rank - 1 or argument(node, "start") not in (0, None):
        return False
    whole, kept = size_expr(shape_of(first(node))[-1]), size_expr(shape_of(node)[-1])
    return ia.add(whole, kept, -1) == ia.integer(1)


def _without_row_maximum(node: fx.Node) -> fx.Node:
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
    is_last = [d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])] == [
        rank - 1
    ]
    return x if is_last and argument(peak, "keepdim") else node


def _sinks(values: MaskValues, node: fx.Node) -> tuple[fx.Node, Operand] | None:
    """(scores, sinks) of `cat([scores, sinks of each head], -1)`."""
    if not is_call(node, aten.cat.default) or len(argument(node, "tensors")) != 2:
        return None
    rank = len(shape_of(node))
    scores, sinks = argument(node, "tensors")
    if int(argument(node, "dim")) % rank != rank - 1 or shape_of(sinks)[-1] != 1:
        return None
    element = values.of(sinks).element
    if not isinstance(element, ia.Read):
        return None
    varying = [index for index in element.indices if ia.variables(index)]
    base = next((n for n in values.graph.nodes if n.name == element.tensor), None)
    if base is None or varying != [axis(rank - 3)]:
        return None
    operand = Operand(base)
    return scores, operand if len(element.indices) == 1 else operand.then(
        aten.reshape.default, [-1]
    )


def _leads_to(values: MaskValues, name: str, product: fx.Node) -> bool:
    node = next((n for n in values.graph.nodes if n.name == name), None)
    while node is not None and node is not product:
        node = first(node) if is_call(node, *VIEWS, *COPIES, *CASTS) else None
    return node is product


def _product_below(values: MaskValues, scores: fx.Node) -> fx.Node | None:
    """The product that the scores are made of."""
    element = values.of(scores).element
    by_name = {n.name: n for n in values.graph.nodes}
    for read in sorted(ia.reads(element), key=repr):
        node = by_name.get(read.tensor)
        while node is not None and is_call(node, *VIEWS, *COPIES, *CASTS):
            node = first(node)
        if node is not None and is_call(node, *PRODUCTS):
            return node
    return None


def _no_product(scores: fx.Node) -> Reject:
    text = f"{op_name(scores)} under the softmax leads to no product of queries and keys"
    return Reject("not-scores", text, scores)


def _used_elsewhere(product: fx.Node, softmax: fx.Node) -> fx.Node | None:
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


def _outer_mask(scores: fx.Node, product: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """(inner scores, mask, hides where true) of the outermost masking op."""
    node = scores
    while is_call(node, *CASTS):
        node = first(node)
    if is_call(node, aten.add.Tensor) and argument(node, "alpha") == 1:
        a, b = node.args[:2]
        for inner, mask in ((a, b), (b, a)):
            if is_tensor(inner) and is_tensor(mask):
                assert isinstance(inner, fx.Node)
                assert isinstance(mask, fx.Node)
                if _depends(inner, product) and not _depends(mask, product):
                    return inner, mask, False
    if is_call(node, aten.masked_fill.Scalar) and argument(node, "value") <= HIDDEN:
        mask = node.args[1]
        assert isinstance(mask, fx.Node)
        return first(node), mask, True
    if is_call(node, aten.where.ScalarOther) and argument(node, "other") <= HIDDEN:
        inner = node.args[1]
        assert isinstance(inner, fx.Node)
        return inner, first(node), False
    return None


def _depends(node: fx.Node, product: fx.Node) -> bool:
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
