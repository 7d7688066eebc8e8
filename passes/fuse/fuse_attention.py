"""fuse_attention: every spelling of attention becomes graphopt::attention.

    (a)  graphopt.attention(...)  emitted by the Hugging Face hook: adopted as it is
    (b)  aten.scaled_dot_product_attention(q, k, v, mask, is_causal, scale)
    (c)  softmax(q @ k^T * scale + mask, -1) @ v, written by hand

    after    graphopt.attention(q, k, v, ..., scale=, causal=, window=)

A mask is dropped only when its meaning is proven (`mask_meaning.py`); otherwise it stays a dense
operand. Repeated key/value heads are read un-repeated. Rejected: softmax over another axis, scores
or probabilities used elsewhere, active dropout, and whatever multiplies no two tensors of heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from graphopt.ir.builder import GraphBuilder, replace
from graphopt.ir.graph import Graph, argument, dtype_of, is_call, op_name, shape_of
from graphopt.ops import attention
from graphopt.passes.base import Pass, Reject, Stage, Tier
from graphopt.passes.fuse.mask_meaning import MaskMeaning, read_mask
from graphopt.passes.registry import register

aten = torch.ops.aten
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_CASTS = (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.type_as.default)
_PRODUCT = (aten.matmul.default, aten.bmm.default)
_SCALE = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
_FILL = (aten.masked_fill.Scalar,)


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """`last` computes attention. mask: dense operand that could not be proven."""

    last: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float
    causal: bool = False
    window: int = 0
    mask: fx.Node | None = None
    padding: fx.Node | None = None
    adopted: bool = False


@register
class FuseAttention(Pass[AttentionSite]):
    """See the module docstring."""

    name: ClassVar[str] = "fuse_attention"
    stage: ClassVar[Stage] = "fuse"
    tier: ClassVar[Tier] = Tier("reassociating", 1e-5)

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        """Attention ops that no site has claimed yet, SDPA calls, softmaxes."""
        sdpa = aten.scaled_dot_product_attention.default
        return [
            node
            for node in graph.nodes
            if is_call(node, sdpa, *_SOFTMAX)
            or (is_call(node, attention.SPEC.overload) and not _is_adopted(node))
        ]

    def check(self, graph: Graph, node: fx.Node) -> AttentionSite | Reject:
        """By road."""
        if is_call(node, attention.SPEC.overload):
            q, k, v = (argument(node, n) for n in ("q_BHSD", "k_BGTD", "v_BGTE"))
            return AttentionSite(node, q, k, v, float(argument(node, "scale")), adopted=True)
        if is_call(node, *_SOFTMAX):
            return _hand_written(node)
        return _sdpa(node)

    def rewrite(self, builder: GraphBuilder, bound: AttentionSite) -> None:
        """Emit the op where the last node stood."""
        with builder.at(bound.last):
            if bound.adopted:
                args, kwargs = bound.last.args, dict(bound.last.kwargs)
                new = builder.emit(attention.SPEC.overload, args, kwargs, like=[bound.last])
            else:
                q, k, v = (_as_heads(builder, n) for n in (bound.q, bound.k, bound.v))
                new = builder.emit(
                    attention.SPEC.overload,
                    [q, k, v, bound.mask, bound.padding],
                    {"scale": bound.scale, "causal": bound.causal, "window": bound.window},
                    like=[bound.last, bound.q, bound.k, bound.v],
                )
                if len(shape_of(bound.last)) == 3:
                    new = builder.emit(aten.squeeze.dim, [new, 0], like=[new])
        new.meta["layer"] = bound.last.meta["layer"]
        replace(builder.graph, bound.last, new)


def _is_adopted(node: fx.Node) -> bool:
    return any(name.startswith("fuse_attention#") for name in node.meta["history"])


def _as_heads(builder: GraphBuilder, node: fx.Node) -> fx.Node:
    """3-D operands get a leading axis of 1: `[B*H, S, D]` is one batch of B*H heads."""
    if len(shape_of(node)) == 4:
        return node
    return builder.emit(aten.unsqueeze.default, [node, 0], like=[node])


def _sdpa(node: fx.Node) -> AttentionSite | Reject:
    if argument(node, "dropout_p"):
        return Reject("dropout-on", "attention dropout is active", node)
    q, k, v = (argument(node, n) for n in ("query", "key", "value"))
    if len(shape_of(q)) not in (3, 4):
        return Reject("not-heads", "expected [batch, heads, sequence, width]", node)
    scale = argument(node, "scale")
    factor = float(scale) if scale is not None else float(shape_of(q)[-1]) ** -0.5
    k, v = _unrepeated(k), _unrepeated(v)
    if argument(node, "is_causal"):
        return AttentionSite(node, q, k, v, factor, causal=True)
    mask = argument(node, "attn_mask")
    return _with_mask(AttentionSite(node, q, k, v, factor), mask)


def _with_mask(site: AttentionSite, mask: fx.Node | None) -> AttentionSite:
    if mask is None:
        return site
    meaning = read_mask(mask, _visible)
    return _apply(site, mask, meaning)


def _visible(values: Tensor) -> Tensor:
    """Booleans as they are; additive masks: 0 is visible, anything very negative is hidden."""
    if values.dtype == torch.bool:
        return values
    hidden = values <= torch.finfo(values.dtype).min / 2
    is_binary = bool((hidden | (values == 0)).all())
    return ~hidden if is_binary else torch.zeros((), dtype=torch.bool)


def _apply(site: AttentionSite, mask: fx.Node, meaning: MaskMeaning | None) -> AttentionSite:
    dense = None if meaning is not None else mask
    return AttentionSite(
        site.last,
        site.q,
        site.k,
        site.v,
        site.scale,
        causal=meaning is not None and meaning.causal,
        window=0 if meaning is None else meaning.window,
        mask=dense,
        padding=None if meaning is None else meaning.padding,
    )


def _hand_written(softmax: fx.Node) -> AttentionSite | Reject:
    """Walk down to the product with v, then up to the product of q and k."""
    rank = len(shape_of(softmax))
    if int(argument(softmax, "dim")) % rank != rank - 1:
        return Reject("softmax-axis", "the softmax is not over the last axis", softmax)
    down = _down(softmax)
    if isinstance(down, Reject):
        return down
    last, v = down
    up = _up(softmax)
    if isinstance(up, Reject):
        return up
    product, scale, mask, fill = up
    q, k = product.args[:2]
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    q, q_scale = _scaled(q)
    k, k_scale = _scaled(k)
    transposed = _transposed(k)
    if transposed is None:
        return Reject("keys-not-transposed", "the second factor is not a transposed key", product)
    k, inner = _scaled(transposed)
    site = AttentionSite(last, q, _unrepeated(k), _unrepeated(v), scale * q_scale * k_scale * inner)
    if fill is not None:
        hidden = fill.args[1]
        assert isinstance(hidden, fx.Node)
        meaning = read_mask(hidden, lambda values: ~values)
        if meaning is None:
            return Reject("masked-fill", "the masked_fill mask has no proven meaning", fill)
        return _apply(site, hidden, meaning)
    return _with_mask(site, mask)


def _down(softmax: fx.Node) -> tuple[fx.Node, fx.Node] | Reject:
    """(probabilities @ v, v)."""
    node = softmax
    while True:
        users = list(node.users)
        if len(users) != 1:
            return Reject("probabilities-used", "the probabilities have other users", softmax)
        (user,) = users
        if is_call(user, *_CASTS, aten.expand.default, aten.contiguous.default):
            node = user
        elif is_call(user, aten.dropout.default):
            if argument(user, "train") and argument(user, "p"):
                return Reject("dropout-on", "attention dropout is active", user)
            node = user
        elif is_call(user, *_PRODUCT) and user.args[0] is node:
            v = user.args[1]
            assert isinstance(v, fx.Node)
            return user, v
        else:
            text = f"expected a product with the values after the softmax, found {op_name(user)}"
            return Reject("no-value-product", text, user)


def _up(
    softmax: fx.Node,
) -> tuple[fx.Node, float, fx.Node | None, fx.Node | None] | Reject:
    """(q @ k^T, scale, additive or boolean mask, masked_fill node)."""
    node = softmax.args[0]
    scale, mask, fill = 1.0, None, None
    while True:
        assert isinstance(node, fx.Node)
        if len(node.users) != 1:
            return Reject("scores-used", "the scores have other users", node)
        if is_call(node, *_PRODUCT):
            return node, scale, mask, fill
        if is_call(node, *_CASTS):
            node = node.args[0]
        elif is_call(node, *_SCALE) and isinstance(node.args[1], (int, float)):
            factor = float(node.args[1])
            scale *= factor if is_call(node, *_SCALE[:2]) else 1.0 / factor
            node = node.args[0]
        elif is_call(node, aten.add.Tensor) and mask is None and fill is None and scale == 1.0:
            left, right = node.args[:2]
            if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
                return Reject("bias-number", "a number is added to the scores", node)
            left_is_mask = _is_mask(left) or not _leads_to_product(left)
            mask, node = (left, right) if left_is_mask else (right, left)
        elif is_call(node, *_FILL) and mask is None and fill is None and scale == 1.0:
            if float(argument(node, "value")) > -1e4:
                return Reject("masked-fill", "masked_fill does not hide positions", node)
            fill, node = node, node.args[0]
        else:
            return Reject("not-scores", f"{op_name(node)} between the product and softmax", node)


def _is_mask(node: fx.Node) -> bool:
    return read_mask(node, _visible) is not None


def _leads_to_product(node: fx.Node) -> bool:
    while is_call(node, *_CASTS, *_SCALE):
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        node = operand
    return is_call(node, *_PRODUCT)


def _scaled(node: fx.Node) -> tuple[fx.Node, float]:
    """Strip a multiplication by a number."""
    factor = 1.0
    while is_call(node, *_SCALE) and isinstance(node.args[1], (int, float)):
        number = float(node.args[1])
        factor *= number if is_call(node, *_SCALE[:2]) else 1.0 / number
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        node = operand
    return node, factor


def _transposed(node: fx.Node) -> fx.Node | None:
    """The operand of a swap of the last two axes."""
    rank = len(shape_of(node))
    if is_call(node, aten.transpose.int):
        dims = {int(argument(node, d)) % rank for d in ("dim0", "dim1")}
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        return operand if dims == {rank - 1, rank - 2} else None
    return None


def _unrepeated(node: fx.Node) -> fx.Node:
    """k or v before its heads were repeated for the query heads, else the node itself."""
    if is_call(node, aten.repeat_interleave.self_int) and argument(node, "dim") in (1, -3):
        operand = node.args[0]
        return operand if isinstance(operand, fx.Node) and len(shape_of(node)) == 4 else node
    if not is_call(node, aten.reshape.default) or len(shape_of(node)) != 4:
        return node
    expand = node.args[0]
    if is_call(expand, aten.clone.default, aten.contiguous.default):
        expand = expand.args[0]  # type: ignore[union-attr]
    if not is_call(expand, aten.expand.default):
        return node
    assert isinstance(expand, fx.Node)
    inserted = expand.args[0]
    if not is_call(inserted, aten.unsqueeze.default) or inserted.args[1] != 2:  # type: ignore[union-attr]
        return node
    assert isinstance(inserted, fx.Node)
    base = inserted.args[0]
    assert isinstance(base, fx.Node)
    wide, heads = shape_of(expand), shape_of(node)[1]
    is_repeat = len(wide) == 5 and isinstance(heads, int) and heads == wide[1] * wide[2]
    same_tail = str(shape_of(node)[2:]) == str(shape_of(base)[2:])
    return base if is_repeat and same_tail and dtype_of(base) == dtype_of(node) else node
