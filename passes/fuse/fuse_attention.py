"""fuse_attention: every spelling of attention becomes graphopt::attention.

    (a)  graphopt.attention(...)  emitted by the Hugging Face hook: adopted as it is
    (b)  aten.scaled_dot_product_attention(q, k, v, mask, is_causal, scale)
    (c)  softmax(...q @ k^T..., -1) @ v, written by hand

    after    graphopt.attention(q, k, v, ..., scale=, causal=, window=, softcap=, predicate=)

What stands between the product and the softmax is read as algebra
(`graphopt.passes.analysis.masks`), not as a chain of ops: scales, softcap, additive and boolean
masks in any order. A mask is dropped only when its meaning is proven; otherwise it stays a dense
operand, with the reason in the report.
Where no node holds it, the model's own ops on scores of zero give it (`attention/residue.py`).
Repeated key/value heads are read un-repeated. Rejected, with a code: softmax over another axis,
scores or probabilities used elsewhere, active dropout, a softmax made of exponentials, and whatever
multiplies no two tensors of heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace as replace_field
from typing import ClassVar

import torch
from torch import fx

from graphopt.ir.assumptions import Assumption
from graphopt.ir.builder import GraphBuilder, replace
from graphopt.ir.graph import Graph, argument, is_call, shape_of
from graphopt.ops import attention
from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks.bits import read_bits
from graphopt.passes.analysis.masks.grid import Candidate
from graphopt.passes.analysis.masks.meaning import Hidden, MaskMeaning, reader
from graphopt.passes.analysis.masks.scores import read_additive
from graphopt.passes.analysis.masks.values import axis
from graphopt.passes.base import Pass, Reject, Stage, Tier, not_floats
from graphopt.passes.fuse.attention.folds import unfolded
from graphopt.passes.fuse.attention.lookalikes import is_lookalike, refused
from graphopt.passes.fuse.attention.operands import Operand, is_tensor, unrepeated
from graphopt.passes.fuse.attention.residue import emit_residue
from graphopt.passes.fuse.attention.site import (
    AttentionSite,
    hand_written,
    mask_sizes,
    proven,
    unfitting,
)
from graphopt.passes.registry import register

aten = torch.ops.aten
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)


@register
class FuseAttention(Pass[AttentionSite]):
    """See the module docstring."""

    name: ClassVar[str] = "fuse_attention"
    stage: ClassVar[Stage] = "fuse"
    tier: ClassVar[Tier] = Tier("reassociating", 1e-5)

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        """Attention ops that no site has claimed yet, SDPA calls, softmaxes, and look-alikes."""
        sdpa = aten.scaled_dot_product_attention.default
        return [
            node
            for node in graph.nodes
            if is_call(node, sdpa, *SOFTMAX)
            or is_lookalike(node)
            or (is_call(node, attention.SPEC.overload) and not _is_adopted(node))
        ]

    def check(self, graph: Graph, node: fx.Node) -> AttentionSite | Reject:
        """By road."""
        site = self._site(graph, node)
        if isinstance(site, Reject):
            return site
        return not_floats("attention", site.last) or site

    def _site(self, graph: Graph, node: fx.Node) -> AttentionSite | Reject:
        if is_call(node, attention.SPEC.overload):
            return _hooked(graph, node)
        if is_call(node, *SOFTMAX):
            return hand_written(graph, node)
        if is_lookalike(node):
            return refused(node)
        return _sdpa(graph, node)

    def remark(self, bound: AttentionSite) -> str:
        """Why a mask operand stays."""
        why = bound.meaning.why_dense
        return f"dense mask kept: {why}" if why else ""

    def rewrite(self, builder: GraphBuilder, bound: AttentionSite) -> None:
        """Emit the op where the last node stood."""
        with builder.at(bound.last):
            operands = [operand.emit(builder) for operand in (bound.q, bound.k, bound.v)]
            if bound.factor is not None:
                op = aten.mul.Tensor if bound.factor[0] == "mul" else aten.div.Tensor
                operands[0] = builder.emit(op, [operands[0], bound.factor[1]], like=operands[:1])
            if bound.is_flat:
                at, make = bound.head_axis, aten.unsqueeze.default
                operands = [builder.emit(make, [x, at], like=[x]) for x in operands]
            meaning = bound.meaning
            new = builder.emit(
                attention.SPEC.overload,
                [
                    *operands,
                    _mask(builder, bound),
                    _padding(builder, meaning),
                    None if bound.sinks is None else bound.sinks.emit(builder),
                    *([list(meaning.aux)] if meaning.aux else []),
                ],
                {
                    "scale": bound.scale,
                    "causal": meaning.causal,
                    "window": meaning.window,
                    "softcap": bound.softcap,
                    **({"predicate": meaning.predicate} if meaning.predicate else {}),
                    **({"bias": meaning.bias} if meaning.bias else {}),
                    **({"hidden": meaning.hidden} if meaning.hidden else {}),
                    **({"empty_is_nan": True} if meaning.empty_is_nan else {}),
                },
                like=[bound.last, *operands],
            )
            new.meta["layer"] = bound.last.meta["layer"]
            if bound.order is not None:
                new = builder.emit(aten.permute.default, [new, list(bound.order)], like=[new])
            if bound.is_folded:
                new = builder.emit(aten.flatten.using_ints, [new, 0, 1], like=[new])
            elif bound.is_flat:
                new = builder.emit(aten.squeeze.dim, [new, bound.head_axis], like=[new])
        new.meta["layer"] = bound.last.meta["layer"]
        for name in meaning.bits:
            layer, source = (new.meta[key] for key in ("layer", "source"))
            made = Assumption("zeros-and-ones", name, builder.site, layer, source)
            builder.graph.assume(made)
        replace(builder.graph, bound.last, new)


def _is_adopted(node: fx.Node) -> bool:
    return any(name.startswith("fuse_attention#") for name in node.meta["history"])


def _mask(builder: GraphBuilder, site: AttentionSite) -> fx.Node | None:
    if site.residue is not None:
        made = emit_residue(builder, *site.residue)
        if not site.is_folded or len(shape_of(made)) == 4:
            return made
        heads = int(site.q.shape[1])
        return builder.emit(aten.unflatten.int, [made, 0, [-1, heads]], like=[made])
    mask = site.meaning.mask
    if mask is None or not site.mask_is_inverted:
        return mask
    return builder.emit(aten.logical_not.default, [mask], like=[mask])


def _padding(builder: GraphBuilder, meaning: MaskMeaning) -> fx.Node | None:
    no = aten.logical_not.default
    parts = [
        *meaning.padding,
        *(builder.emit(no, [node], like=[node]) for node in meaning.hiding),
    ]
    if not parts:
        return None
    result, *others = (_flat(builder, part) for part in parts)
    for part in others:
        result = builder.emit(aten.logical_and.default, [result, part], like=[result, part])
    return result


def _flat(builder: GraphBuilder, part: fx.Node) -> fx.Node:
    """`[B, T]` of `[B, 1, 1, T]`."""
    between = list(range(1, len(shape_of(part)) - 1))
    return builder.emit(aten.squeeze.dims, [part, between], like=[part]) if between else part


def _hooked(graph: Graph, node: fx.Node) -> AttentionSite:
    """Adopted; a dense mask that transformers built is read like any other."""
    q, k, v, mask, pad, sinks = (
        argument(node, name) for name in ("q_BHSD", "k_BGTD", "v_BGTE", "mask", "pad_BT", "sinks_H")
    )
    given = MaskMeaning(
        bool(argument(node, "causal")),
        int(argument(node, "window")),
        () if pad is None else (pad,),
        (),
        str(argument(node, "predicate")),
        str(argument(node, "bias")),
        tuple(argument(node, "aux") or ()),
        mask,
        "" if mask is None else "mask-not-proven: transformers' own mask",
        str(argument(node, "hidden")),
        bool(argument(node, "empty_is_nan")),
    )
    scale, softcap = float(argument(node, "scale")), float(argument(node, "softcap"))
    sink = None if sinks is None else Operand(sinks)
    site = AttentionSite(node, Operand(q), Operand(k), Operand(v), scale, softcap, sink, given)
    if mask is None:
        return site
    sizes = (*shape_of(q)[:3], shape_of(k)[2])
    alone = _with_mask(graph, replace_field(site, meaning=MaskMeaning()), mask, sizes).meaning
    if (given.window and alone.window) or given.predicate or given.bias or given.aux:
        return site
    return replace_field(
        site,
        meaning=MaskMeaning(
            given.causal or alone.causal,
            given.window or alone.window,
            (*given.padding, *alone.padding),
            alone.hiding,
            alone.predicate,
            alone.bias,
            alone.aux,
            alone.mask,
            alone.why_dense,
            given.hidden or alone.hidden,
            given.empty_is_nan or alone.empty_is_nan,
            alone.low,
            alone.bits,
        ),
    )


def _sdpa(graph: Graph, node: fx.Node) -> AttentionSite | Reject:
    if argument(node, "dropout_p"):
        text = "attention dropout is active"
        return Reject("dropout-on", text, node, "turn dropout off: model.eval()")
    q, k, v = (argument(node, name) for name in ("query", "key", "value"))
    if len(shape_of(q)) not in (3, 4) or len(shape_of(k)) != len(shape_of(q)):
        text = "expected [batch, heads, sequence, width]"
        return Reject("not-heads", text, node, "give q, k and v four axes")
    scale = argument(node, "scale")
    factor = float(scale) if scale is not None else float(shape_of(q)[-1]) ** -0.5
    mask = argument(node, "attn_mask")
    operands = [Operand(q), Operand(k), Operand(v)]
    whole = [unfolded(operand) for operand in operands]
    is_flat = len(shape_of(q)) == 3
    # A mask over folded heads could tell them apart.
    is_folded = is_flat and mask is None and None not in whole
    if is_folded:
        operands = [operand for operand in whole if operand is not None]
    q_BHSD, k_BGTD, v_BGTE = operands[0], *map(unrepeated, operands[1:])
    if k_BGTD.shape[1] != v_BGTE.shape[1]:
        k_BGTD, v_BGTE = operands[1:]
    if not is_flat or is_folded:
        unfit = unfitting(q_BHSD, k_BGTD, v_BGTE, node, node)
        if unfit is not None:
            return unfit
    site = AttentionSite(
        node,
        q_BHSD,
        k_BGTD,
        v_BGTE,
        factor,
        0.0,
        None,
        MaskMeaning(),
        is_folded=is_folded,
        is_flat=is_flat and not is_folded,
    )
    sizes = (*shape_of(q)[:-1], shape_of(k)[-2])
    if argument(node, "is_causal"):
        visible = ia.less_equal(axis(3), axis(2))
        hidden = Hidden(ia.real(float("-inf")), is_safe=True)
        found = proven(graph, site, visible, None, sizes, None, hidden)
        if isinstance(found, AttentionSite):
            return found
        text = f"is_causal with more queries than keys: {found.text}"
        return Reject("causal-alignment", text, node, "give as many queries as keys, or a mask")
    return _with_mask(graph, site, mask, sizes)


def _with_mask(
    graph: Graph,
    site: AttentionSite,
    mask: fx.Node | None,
    sizes: tuple[int | torch.SymInt, ...],
) -> AttentionSite:
    if mask is None or not is_tensor(mask):
        return site
    values = reader(graph)
    element = values.element(mask, mask_sizes(sizes))
    if element is None:
        return site.dense(mask, "mask-shape: the mask has more axes than the scores")
    conditions, bits = read_bits(values, element)
    visible, bias, low = read_additive(conditions)
    if site.sinks is not None and bias is not None:
        return site.dense(mask, "bias-and-sinks: a bias that the sinks do not get")
    candidate = Candidate(mask, None, sizes, site.scale, site.softcap, is_safe=True)
    hidden = Hidden(low, is_safe=True)
    found = proven(graph, site, visible, bias, sizes, candidate, hidden, values, bits)
    if isinstance(found, AttentionSite):
        return found
    return site.dense(mask, f"{found.code}: {found.text}")
