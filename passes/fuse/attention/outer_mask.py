"""The outermost mask of some scores, kept as a dense operand when its meaning is not known.

scores + mask                   floats: added to every score, the hidden ones too
scores.masked_fill(mask, v)     booleans: a hidden score is v
where(mask, scores, v)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from graphopt.ir.graph import argument, dtype_of, is_call
from graphopt.ops.predicate import added_to
from graphopt.passes.analysis.masks.meaning import MaskMeaning
from graphopt.passes.analysis.masks.scores import HIDDEN
from graphopt.passes.fuse.attention.operands import first, is_tensor
from graphopt.passes.fuse.attention.walk import depends
from graphopt.passes.fuse.walk import CASTS

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class OuterMask:
    """`inner`: the scores below. fill: what hidden scores become, None of a mask that is added.
    is_inverted: it hides where true."""

    inner: fx.Node
    mask: fx.Node
    fill: float | None = None
    is_inverted: bool = False

    def over(self, below: MaskMeaning, why: str, *, is_safe: bool) -> MaskMeaning:
        """The meaning of the scores below with this mask as the dense operand."""
        if self.fill is None:
            hidden = _plus_mask(below.low) if below.hides else ""
            is_finite = False
        else:
            filled = repr(float(self.fill))
            hidden = f"where(mask, {below.low}, {filled})" if below.hides else filled
            is_finite = hidden == filled != "-inf"
        return replace(
            below,
            mask=self.mask,
            why_dense=why,
            hidden="" if hidden == "-inf" else hidden,
            empty_is_nan=not (is_safe or is_finite),
        )


def _plus_mask(low: str) -> str:
    moved_by = added_to("s", low)
    if low == "-inf":
        return low
    return f"({low}) + mask" if moved_by is None else f"s + ({moved_by} + mask)"


def outer_mask(scores: fx.Node, product: fx.Node) -> OuterMask | None:
    """The outermost masking op between the product and `scores`."""
    node = scores
    while is_call(node, *CASTS):
        node = first(node)
    if is_call(node, aten.add.Tensor) and argument(node, "alpha") == 1:
        a, b = node.args[:2]
        for inner, mask in ((a, b), (b, a)):
            if is_tensor(inner) and is_tensor(mask):
                assert isinstance(inner, fx.Node)
                assert isinstance(mask, fx.Node)
                is_mask = not depends(mask, product) and dtype_of(mask).is_floating_point
                if is_mask and depends(inner, product):
                    return OuterMask(inner, mask)
    if is_call(node, aten.masked_fill.Scalar) and argument(node, "value") <= HIDDEN:
        mask = node.args[1]
        assert isinstance(mask, fx.Node)
        return OuterMask(first(node), mask, argument(node, "value"), is_inverted=True)
    if is_call(node, aten.where.ScalarOther) and argument(node, "other") <= HIDDEN:
        inner = node.args[1]
        assert isinstance(inner, fx.Node)
        return OuterMask(inner, first(node), argument(node, "other"))
    return None
