"""Activations of gated layers in their spellings: what is the gate, which function is it.

    silu     aten.silu(x)                  x * sigmoid(x)
    gelu     aten.gelu(x)                  0.5 * x * (1 + erf(x / sqrt(2)))
    tanh     aten.gelu(x, "tanh")          0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))

A written number may differ from the formula's by 1e-6 relative: the result then changes by less
than the tier allows (by as much for the half, by less for the others). Products are read as sets of
factors, so their order does not matter. Refused by name: a sigmoid made of exponentials, numbers
that are another function's, an erf or tanh that is not added to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from graphopt.ir.graph import argument, is_call, op_name
from graphopt.passes.base import Reject
from graphopt.passes.fuse.walk import CASTS, only_user, other_operand

aten = torch.ops.aten
Kind = Literal["silu", "gelu", "tanh"]
_MULS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
_ADDS = (aten.add.Tensor, aten.add.Scalar)
_SUBTRACTIONS = (aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar)
_DIVISIONS = (aten.div.Tensor, aten.reciprocal.default)
_EXPONENTIALS = (aten.exp.default, aten.exp2.default)
_NEARNESS = 1e-6


@dataclass(frozen=True, slots=True)
class Gated:
    """`product` is activation(gate) * up."""

    product: fx.Node
    kind: Kind
    gate: fx.Node
    up: fx.Node


def is_activation(node: fx.Node) -> bool:
    """Candidates: silu, gelu; and the sigmoid, erf, tanh or exponential of a hand-written one."""
    if is_call(node, aten.silu.default, aten.gelu.default, aten.erfc.default):
        return True
    user = only_user(node)
    if is_call(node, aten.sigmoid.default, aten.hardsigmoid.default):
        # A sigmoid that multiplies nothing is no activation: a router, a mask.
        if is_call(user, aten.mul.Tensor):
            return True
        return user is not None and is_call(user, *_ADDS) and node.args[0] in user.args
    if user is None or not is_call(user, *_ADDS, *_SUBTRACTIONS):
        return False
    if not any(isinstance(operand, (int, float)) for operand in user.args[:2]):
        return False
    if is_call(node, *_EXPONENTIALS):
        return is_call(only_user(user), *_DIVISIONS) and is_call(user, *_ADDS)
    return is_call(node, aten.erf.default, aten.tanh.default)


def read_gated(node: fx.Node) -> Gated | Reject:
    """The activation at a candidate, and what it is multiplied by."""
    if is_call(node, aten.silu.default, aten.gelu.default):
        gate = node.args[0]
        assert isinstance(gate, fx.Node)
        is_tanh = is_call(node, aten.gelu.default) and argument(node, "approximate") == "tanh"
        plain: Kind = "silu" if is_call(node, aten.silu.default) else "gelu"
        return _multiplied(node, "tanh" if is_tanh else plain, gate)
    if is_call(node, aten.sigmoid.default):
        return _sigmoid(node)
    if is_call(node, *_EXPONENTIALS, aten.hardsigmoid.default):
        return Reject(
            "sigmoid-by-hand",
            f"the sigmoid is made of {op_name(node)}",
            node,
            "use torch.sigmoid or torch.nn.functional.silu",
        )
    return _unknown(node) if is_call(node, aten.erfc.default) else _half_of_one_plus(node)


def _multiplied(value: fx.Node, kind: Kind, gate: fx.Node) -> Gated | Reject:
    product = only_user(value)
    if product is not None and is_call(product, *CASTS):
        return Reject(
            "activation-cast",
            "the activation is rounded before it is multiplied",
            product,
            "multiply first, cast the product",
        )
    if product is None or not is_call(product, aten.mul.Tensor):
        return Reject("not-gated", "the activation is not multiplied by an up projection", value)
    up = other_operand(product, value)
    if up is None:
        return Reject("not-gated", "the activation is multiplied by a number or itself", value)
    return Gated(product, kind, gate, up)


def _sigmoid(sigmoid: fx.Node) -> Gated | Reject:
    """x * sigmoid(x) * up in any order; sigmoid(c * x) is refused by name."""
    x, product = sigmoid.args[0], only_user(sigmoid)
    assert product is not None
    assert isinstance(x, fx.Node)
    if not is_call(product, aten.mul.Tensor):
        return Reject("not-silu", "the sigmoid is added to its own argument", sigmoid)
    other = other_operand(product, sigmoid)
    if other is x:
        return _multiplied(product, "silu", x)
    if is_call(x, *_MULS) and x.args[0] is other and isinstance(x.args[1], float):
        return Reject(
            "quick-gelu",
            f"x * sigmoid({x.args[1]} * x) is an approximation of gelu of its own",
            sigmoid,
            "use silu, gelu or gelu(approximate='tanh')",
        )
    outer = only_user(product)
    if is_call(outer, aten.mul.Tensor) and outer is not None and x in outer.args:
        return _multiplied_by(outer, "silu", x, other)
    inner = other if other is not None and only_user(other) is product else None
    if inner is not None and is_call(inner, aten.mul.Tensor) and x in inner.args:
        return _multiplied_by(product, "silu", x, other_operand(inner, x))
    return Reject("not-silu", "the sigmoid does not multiply its own argument", sigmoid)


def _multiplied_by(
    product: fx.Node, kind: Kind, gate: fx.Node, up: fx.Node | None
) -> Gated | Reject:
    if up is None:
        return Reject("not-gated", "the activation is multiplied by a number or itself", product)
    return Gated(product, kind, gate, up)


def _half_of_one_plus(root: fx.Node) -> Gated | Reject:
    """0.5 * x * (1 + erf or tanh of an inner term)."""
    shifted = only_user(root)
    assert shifted is not None
    if not is_call(shifted, *_ADDS) or shifted.kwargs or 1 not in shifted.args:
        return _unknown(root)
    kind: Kind = "gelu" if is_call(root, aten.erf.default) else "tanh"
    inner = root.args[0]
    gates = (x for x in _terms(inner) if _is_argument(inner, x, kind))
    x, top = next(gates, None), only_user(shifted)
    # The half and x are applied in either order, one product each.
    while x is not None and top is not None and is_call(top, *_MULS):
        number, tensors = _factors(top, frozenset([shifted, x])) or (0.0, [])
        if len(tensors) > 2:
            break
        if x in tensors and shifted in tensors and _near(number, 0.5):
            return _multiplied(top, kind, x)
        top = only_user(top)
    return _unknown(root)


def _terms(node: object) -> list[fx.Node]:
    """The node and everything it is made of by sums, products and powers, nearest first."""
    found: list[fx.Node] = []
    queue = [node]
    # A gelu has eight; what the gate itself is made of may follow without end.
    while queue and len(found) < 16:
        term = queue.pop(0)
        if isinstance(term, fx.Node) and term not in found:
            found.append(term)
            if is_call(term, *_MULS, *_ADDS, aten.pow.Tensor_Scalar):
                queue += term.args
    return found


def _unknown(root: fx.Node) -> Reject:
    return Reject(
        "not-gelu",
        "the formula around it is not the one of gelu, to six digits",
        root,
        "use torch.nn.functional.gelu",
    )


def _is_argument(inner: object, x: fx.Node, kind: Kind) -> bool:
    """gelu: x / sqrt(2). tanh: sqrt(2 / pi) * (x + 0.044715 * x^3), also as
    sqrt(2 / pi) * x * (1 + 0.044715 * x * x)."""
    outer = _factors(inner, frozenset([x]))
    if kind == "gelu":
        return outer is not None and outer[1] == [x] and _near(outer[0], math.sqrt(0.5))
    if outer is None or not _near(outer[0], math.sqrt(2 / math.pi)):
        return False
    sums = [t for t in outer[1] if is_call(t, *_ADDS)]
    if len(sums) != 1 or sums[0].kwargs:
        return False
    outside = [t for t in outer[1] if t is not sums[0]]
    first, second = sums[0].args[:2]
    for one, cubic in ((first, second), (second, first)):
        term = _factors(cubic, frozenset([x])) if isinstance(cubic, fx.Node) else None
        if term is None or not _near(term[0], 0.044715):
            continue
        if outside == [] and one is x and term[1] == [x] * 3:
            return True
        if outside == [x] and one == 1 and term[1] == [x] * 2:
            return True
    return False


def _factors(node: object, leaves: frozenset[fx.Node]) -> tuple[float, list[fx.Node]] | None:
    """(number, tensors) whose product the node is; `leaves` are not taken apart."""
    if isinstance(node, (int, float)):
        return float(node), []
    if not isinstance(node, fx.Node):
        return None
    if node not in leaves and is_call(node, *_MULS):
        left, right = (_factors(operand, leaves) for operand in node.args[:2])
        if left is None or right is None or node.kwargs:
            return None
        if is_call(node, aten.div.Tensor, aten.div.Scalar):
            return None if right[1] or not right[0] else (left[0] / right[0], left[1])
        return left[0] * right[0], left[1] + right[1]
    if node not in leaves and is_call(node, aten.pow.Tensor_Scalar) and node.args[1] in (2, 3):
        base = _factors(node.args[0], leaves)
        power = int(node.args[1])  # type: ignore[arg-type]
        return None if base is None else (base[0] ** power, base[1] * power)
    return 1.0, [node]


def _near(number: float, expected: float) -> bool:
    return math.isclose(number, expected, rel_tol=_NEARNESS)
