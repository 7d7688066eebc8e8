"""What stands where attention has its softmax and is none: candidates that are refused by name.

    softmax-by-hand    exp(s) / sum(exp(s)), with exp2, a row maximum or logsumexp too
    not-softmax        sigmoid(s) @ v, log_softmax(s) @ v

where s comes from a product and the result goes into one.
"""

from __future__ import annotations

import torch
from torch import fx

from graphopt.ir.graph import is_call, op_name, shape_of
from graphopt.passes.base import Reject
from graphopt.passes.fuse.attention.operands import COPIES, PRODUCTS, VIEWS, is_tensor
from graphopt.passes.fuse.walk import CASTS

aten = torch.ops.aten
_EXPONENTIALS = (aten.exp.default, aten.exp2.default)
_OTHERS = (aten.sigmoid.default, aten.log_softmax.int)
_NUMBERS = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.clamp.default)
_MASKS = (aten.masked_fill.Scalar, aten.where.ScalarOther)
_STEPS = (*CASTS, *COPIES, *VIEWS, *_NUMBERS, *_MASKS, aten.tanh.default)
_REDUCTIONS = (aten.sum.dim_IntList, aten.reciprocal.default, aten.exp.default)
_FARTHEST = 12


def is_lookalike(node: fx.Node) -> bool:
    """Candidates: an exponential or a sigmoid between a product of scores and one with values."""
    if not is_call(node, *_EXPONENTIALS, *_OTHERS) or len(shape_of(node)) not in (3, 4):
        return False
    return _comes_from_product(node) and _goes_into_product(node)


def refused(node: fx.Node) -> Reject:
    """Why a candidate is no softmax."""
    if is_call(node, *_OTHERS):
        text = f"the scores go through {op_name(node)} instead of a softmax"
        return Reject("not-softmax", text, node)
    text = f"the softmax is written by hand, with {op_name(node)}"
    return Reject("softmax-by-hand", text, node, "use torch.softmax(scores, -1)")


def _comes_from_product(node: fx.Node) -> bool:
    for _ in range(_FARTHEST):
        operands = [operand for operand in node.args if is_tensor(operand)]
        if not operands:
            return False
        # Of `where(visible, scores, number)` the scores come second.
        node = operands[-1] if is_call(node, aten.where.ScalarOther) else operands[0]  # type: ignore[assignment]
        if is_call(node, *PRODUCTS):
            return True
        if not is_call(node, *_STEPS):
            return False
    return False


def _goes_into_product(node: fx.Node) -> bool:
    level = {node}
    for _ in range(_FARTHEST):
        users = {user for above in level for user in above.users}
        if any(is_call(user, *PRODUCTS) for user in users):
            return True
        level = {user for user in users if is_call(user, *_STEPS, *_REDUCTIONS)}
    return False
