"""Hand-written attention: from the softmax down to the values and up to the queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from graphopt.ir.graph import Graph, argument, dtype_of, is_call, op_name, shape_of
from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks.algebra import Expr
from graphopt.passes.analysis.masks.bits import read_bits
from graphopt.passes.analysis.masks.grid import Candidate, agrees
from graphopt.passes.analysis.masks.meaning import (
    Hidden,
    MaskMeaning,
    Unproven,
    read_meaning,
    reader,
)
from graphopt.passes.analysis.masks.reshapes import bounded, limits
from graphopt.passes.analysis.masks.scores import Factor, Unread, adds, read_scores
from graphopt.passes.analysis.masks.values import MaskValues, axis, size_expr
from graphopt.passes.base import Reject
from graphopt.passes.fuse.attention.folds import unfolded
from graphopt.passes.fuse.attention.operands import (
    Operand,
    first,
    read_product,
    transposed,
    unrepeated,
    unscaled,
)
from graphopt.passes.fuse.attention.outer_mask import outer_mask
from graphopt.passes.fuse.attention.residue import can_emit
from graphopt.passes.fuse.attention.walk import (
    Down,
    leads_to,
    products_below,
    read_sinks,
    rounded,
    used_elsewhere,
    walk_down,
    without_row_maximum,
)
from graphopt.passes.fuse.walk import CASTS, is_last_axis

aten = torch.ops.aten
Sizes = Sequence[int | torch.SymInt]


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """`last` computes attention(q, k, v). order: permutation of the result's axes. is_folded: the
    result is `[B * H, S, E]` of four axes. is_flat: operands and result have three axes.
    mask_is_inverted: the dense mask hides where true. factor: op and node of what multiplies or
    divides the queries. residue: product and scores, where the dense mask is what the model adds
    to scores of zero. is_safe: rows of -inf alone give zeros."""

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
    factor: tuple[str, fx.Node] | None = None
    residue: tuple[fx.Node, fx.Node] | None = None
    is_safe: bool = False

    @property
    def head_axis(self) -> int:
        """Where three axes get a fourth: heads apart, or heads of one batch where masks tell the
        first axis apart."""
        meaning = self.meaning
        is_padded = meaning.padding or meaning.hiding
        is_masked = meaning.mask or is_padded or meaning.predicate or meaning.bias
        return 0 if is_masked or self.sinks or self.residue else 1

    def dense(self, mask: fx.Node, why: str) -> AttentionSite:
        """With the mask as it is."""
        return replace(self, meaning=replace(MaskMeaning(), mask=mask, why_dense=why))


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
    hidden: Hidden,
    values: MaskValues | None = None,
    bits: tuple[str, ...] = (),
) -> AttentionSite | Unproven:
    """The site with the meaning of a mask, proven and tested; bits: of `read_bits`."""
    meaning = read_meaning(values or reader(graph), visible, bias, hidden, mask_sizes(sizes))
    if isinstance(meaning, Unproven):
        return meaning
    meaning = replace(meaning, bits=bits)
    if candidate is not None and not agrees(graph, candidate, meaning):
        return Unproven("mask-check-failed", "the mask computes something else on a small grid")
    return replace(site, meaning=meaning)


def hand_written(graph: Graph, softmax: fx.Node) -> AttentionSite | Reject:
    """The attention around a softmax, or why it is none."""
    rank = len(shape_of(softmax))
    if not is_last_axis(softmax, argument(softmax, "dim")):
        text = "the softmax is not over the last axis"
        return Reject("softmax-axis", text, softmax, "put the keys on the last axis")
    down = walk_down(graph, softmax)
    if isinstance(down, Reject):
        return down
    if rank not in (3, 4):
        return Reject("not-heads", f"scores of {rank} axes", softmax, "use 3 or 4 axes")
    values = reader(graph)
    sinks: Operand | None = None
    scores = without_row_maximum(first(softmax))
    if down.drops_sink:
        found = read_sinks(values, scores)
        if found is None:
            return Reject("not-scores", "a column is dropped that is no sink", softmax)
        scores, sinks = found
    refused = _no_product(scores)
    for i, product in enumerate(products_below(values, scores)):
        found_site = _around(graph, values, softmax, down, scores, product, sinks)
        if isinstance(found_site, AttentionSite):
            return found_site
        refused = refused if i else found_site
    return refused


def _around(
    graph: Graph,
    values: MaskValues,
    softmax: fx.Node,
    down: Down,
    scores: fx.Node,
    product: fx.Node,
    sinks: Operand | None,
) -> AttentionSite | Reject:
    used = used_elsewhere(product, softmax)
    if used is not None:
        text = f"the scores are also used by {op_name(used)}"
        return Reject("scores-used", text, used, "use the scores for nothing but the softmax")
    coarse = rounded(softmax, product, down.last)
    if coarse is not None:
        text = f"the scores or probabilities are rounded to {dtype_of(coarse)}"
        return Reject("rounded-between", text, coarse, "keep them in the dtype of the values")
    site = _site(graph, down, scores, product, sinks)
    if isinstance(site, Reject):
        return site
    site = replace(site, is_safe=is_call(softmax, aten._safe_softmax.default))
    return _masked(graph, values, site, scores, product)


def _site(
    graph: Graph,
    down: Down,
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
    whole_k, k_scale = unscaled(graph, operands[1])
    whole_v = _unwidened(graph, operands[2])
    k, inner_scale = unscaled(graph, unrepeated(whole_k))
    v = _unwidened(graph, unrepeated(whole_v))
    if not is_flat and k.shape[1] != v.shape[1]:
        k, v, inner_scale = whole_k, whole_v, 1.0
    scale *= q_scale * k_scale * inner_scale
    unfit = unfitting(q, k, v, scores, down.last)
    if unfit is not None:
        return unfit
    dtypes = {dtype_of(operand.node) for operand in (q, k, v)} | {dtype_of(down.last)}
    if len(dtypes) != 1:
        text = f"queries, keys, values and result have dtypes {sorted(map(str, dtypes))}"
        return Reject("dtype-mix", text, down.last, "use one dtype")
    return AttentionSite(
        down.last, q, k, v, scale, 0.0, sinks, MaskMeaning(), down.order, is_folded, is_flat
    )


def unfitting(q: Operand, k: Operand, v: Operand, scores: fx.Node, last: fx.Node) -> Reject | None:
    """Operands that torch broadcasts and the op does not."""
    if len(q.shape) == 3:
        if q.shape[0] == k.shape[0] == v.shape[0]:
            return None
        return Reject("batch-differs", "queries, keys and values differ in batch", last)
    text = f"queries {q.shape[:2]}, keys {k.shape[:2]} and values {v.shape[:2]}"
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        return Reject("batch-differs", f"batch of {text}", last, "expand them to one batch")
    heads = shape_of(scores)[1] if len(shape_of(scores)) == 4 else int(q.shape[1])
    is_grouped = k.shape[1] == v.shape[1] and str(heads) == q.shape[1]
    if is_grouped and all(n.isdigit() for n in (q.shape[1], k.shape[1])):
        is_grouped = int(q.shape[1]) % int(k.shape[1]) == 0
    if not is_grouped or k.shape[2] != v.shape[2]:
        return Reject("heads-differ", f"heads or lengths of {text}", last, "repeat the heads alike")
    return None


def _unwidened(graph: Graph, v: Operand) -> Operand:
    """Values before casts to wider floats; a scale of the values stays where it is."""
    inner, factor = unscaled(graph, v)
    return inner if factor == 1.0 else v


def _masked(
    graph: Graph, values: MaskValues, site: AttentionSite, scores: fx.Node, product: fx.Node
) -> AttentionSite | Reject:
    """The site with scale, softcap and mask as the scores say; with a dense mask if need be, better
    one that is there than one to be made."""
    found = _read(graph, values, site, scores, product)
    if isinstance(found, AttentionSite):
        if found.residue is None:
            return found
        why = found.meaning.why_dense
    else:
        why = f"{found.code}: {found.text}"
    peeled = outer_mask(scores, product)
    if peeled is not None and _may_stay(site, peeled.mask):
        below = _read(graph, values, site, peeled.inner, product)
        is_plain = isinstance(below, AttentionSite) and below.residue is None
        if is_plain and isinstance(below, AttentionSite) and below.meaning.mask is None:
            meaning = peeled.over(below.meaning, why, is_safe=site.is_safe)
            return replace(below, meaning=meaning, mask_is_inverted=peeled.is_inverted)
    return found if isinstance(found, AttentionSite) else Reject(found.code, found.text, scores)


def _may_stay(site: AttentionSite, mask: fx.Node) -> bool:
    """Whether the op means the same by a dense mask."""
    return not (site.is_folded and len(shape_of(mask)) == 3 and shape_of(mask)[0] != 1)


@dataclass(frozen=True, slots=True)
class _Element:
    """An element of the scores over four axes, and what its product is called there."""

    sizes: tuple[Expr, ...]
    element: Expr
    product: ia.Read


def _element(
    values: MaskValues, site: AttentionSite, scores: fx.Node, product: fx.Node
) -> _Element | Unread:
    """The scores as algebra; axes of folded heads are told apart."""
    sizes = mask_sizes(shape_of(scores))
    element = values.element(scores, sizes)
    atoms = () if element is None else ia.reads(element)
    atom = next((r for r in atoms if leads_to(values, r.tensor, product)), None)
    if element is None or atom is None:
        return Unread("not-scores", "the softmax is not over a product of queries and keys")
    heads = int(site.q.shape[1]) if site.is_folded and site.q.shape[1].isdigit() else 0
    if heads and len(shape_of(scores)) == 3:
        sizes = (ia.floor_divide(sizes[1], heads), ia.integer(heads), *sizes[2:])
        moved = {axis(1): _folded_index(sizes)}
        element = bounded(ia.substitute(element, moved), limits(sizes))
        indices = tuple(bounded(ia.substitute(i, moved), limits(sizes)) for i in atom.indices)
        atom = replace(atom, indices=indices)
    node = values.named(atom.tensor)
    assert node is not None
    own = values.of(node).sizes
    # The product is read at the softmax's own indices.
    wanted, at = sizes[4 - len(own) :], _own_indices(sizes)[4 - len(own) :]
    if len(own) == 3 and site.is_folded and heads:
        wanted = (ia.times(sizes[0], heads), *sizes[2:])
        at = (_folded_index(sizes), *at[1:])
    if own != wanted or atom.indices != at:
        return Unread("not-scores", "the scores are moved or cut on their way to the softmax")
    return _Element(sizes, element, atom)


def _own_indices(sizes: tuple[Expr, ...]) -> tuple[Expr, ...]:
    one = ia.integer(1)
    return tuple(ia.integer(0) if size == one else axis(i) for i, size in enumerate(sizes))


def _folded_index(sizes: tuple[Expr, ...]) -> Expr:
    """Where (batch, head) is in one axis of both."""
    batch, head = _own_indices(sizes)[:2]
    return ia.add(head, batch, int(ia.parts(sizes[1])[1]))


def _four(scores: fx.Node, sizes: tuple[Expr, ...]) -> Sizes:
    """Sizes of the scores, folded heads told apart."""
    own = shape_of(scores)
    if len(own) == 4 or mask_sizes(own) == sizes:
        return own
    heads = int(ia.parts(sizes[1])[1])
    return (own[0] // heads, heads, *own[1:])


def _factor(
    values: MaskValues, site: AttentionSite, factor: Factor, sizes: tuple[Expr, ...]
) -> tuple[str, fx.Node] | None:
    """The node that queries can be scaled by instead of the scores."""
    one = ia.integer(1)
    for node in values.nodes():
        value = node.meta["val"]
        if not isinstance(value, Tensor) or value.dtype != dtype_of(site.q.node):
            continue
        own = values.of(node).sizes
        wanted = (*sizes[:3], one)[4 - len(own) :]
        if len(own) > 4 or any(x not in (one, y) for x, y in zip(own, wanted, strict=True)):
            continue
        if values.element(node, sizes) == factor.value:
            return factor.op, node
    return None


def _read(
    graph: Graph, values: MaskValues, site: AttentionSite, scores: fx.Node, product: fx.Node
) -> AttentionSite | Unproven | Unread:
    found = _element(values, site, scores, product)
    if isinstance(found, Unread):
        return found
    conditions, bits = read_bits(values, found.element)
    parts = read_scores(conditions, found.product)
    if isinstance(parts, Unread):
        return parts
    if site.sinks is not None and parts.bias is not None:
        return Unread("bias-and-sinks", "a bias that the sinks do not get")
    is_masked = parts.visible != ia.TRUE or parts.bias is not None
    by_head = axis(1) in ia.variables(parts.visible) or parts.bias is not None
    is_symbolic = site.is_folded and not site.q.shape[1].isdigit()
    if is_symbolic and len(shape_of(scores)) == 3 and is_masked and by_head:
        return Unread("folded-heads", "a mask over heads that are folded into the batch")
    factor = None if parts.factor is None else _factor(values, site, parts.factor, found.sizes)
    if parts.factor is not None and (factor is None or site.is_flat):
        return Unread("scale-by-data", "the scores are scaled by what is no factor of the queries")
    scaled = replace(site, scale=site.scale * parts.scale, softcap=parts.softcap, factor=factor)
    like = _four(scores, found.sizes)
    candidate = Candidate(scores, product, like, parts.scale, parts.softcap, site.is_safe, factor)
    kept = scores
    while is_call(kept, *CASTS):
        kept = first(kept)
    hidden = Hidden(parts.hidden, dtype_of(kept), site.is_safe)
    meaning = read_meaning(values, parts.visible, parts.bias, hidden, found.sizes)
    if isinstance(meaning, Unproven):
        if site.sinks is not None or not adds(conditions) or not can_emit(product):
            return meaning
        candidate = replace(candidate, residue=True)
        why = f"{meaning.code}: {meaning.text}"
        scaled = replace(scaled, residue=(product, scores))
        meaning = MaskMeaning(why_dense=why, empty_is_nan=not site.is_safe)
    else:
        meaning = replace(meaning, bits=bits)
    if not agrees(graph, candidate, meaning):
        return Unproven("mask-check-failed", "the mask computes something else on a small grid")
    return replace(scaled, meaning=meaning)


def _no_product(scores: fx.Node) -> Reject:
    text = f"{op_name(scores)} under the softmax leads to no product of queries and keys"
    return Reject("not-scores", text, scores)
