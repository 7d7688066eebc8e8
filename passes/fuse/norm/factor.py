"""The factor of a norm: 1 / sqrt(mean(x^2) + eps) in its spellings, and the product with x.

    rsqrt(v + eps)        x * rsqrt(..)         (v + eps) ** -0.5      x * ..
    sqrt(v + eps)         x / sqrt(..)          x * (1 / sqrt(..))
    (v + eps) ** 0.5      x / ..

with v = mean(x^2, -1), x centred or not, or v = var(x, -1) and x centred. Refused by name: a mean
over another axis, a factor or a variance that is used elsewhere, the unbiased variance, no epsilon
under the root, an epsilon behind it, and what is no square root.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphopt.ir.graph import argument, dtype_of, is_call, op_name
from graphopt.passes.base import Reject
from graphopt.passes.fuse.walk import CASTS, is_last_axis, only_user, uncast

aten = torch.ops.aten
_ADDS = (aten.add.Tensor, aten.add.Scalar)
_VARIANCES = (aten.var.correction, aten.var.dim)
_STATISTICS = (aten.mean.dim, aten.sum.dim_IntList)
_ROOTS = (aten.rsqrt.default, aten.sqrt.default)
_POINTWISE = (
    *_ADDS,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.abs.default,
    aten.clamp.default,
    aten.maximum.default,
    aten.sqrt.default,
)
_LAST_AXIS = "normalise over the last axis, with keepdim=True"


@dataclass(frozen=True, slots=True)
class Factor:
    """`product` is x normalised, x as wide as the statistics. centred: the mean was subtracted."""

    product: fx.Node
    x: fx.Node
    eps: float
    centred: bool


def is_root_of_mean(node: fx.Node) -> bool:
    """Candidates: rsqrt of anything; sqrt and powers of +-1/2 of something plus something; and
    sqrt, powers, logarithms and reciprocals of a mean of squares."""
    if is_call(node, aten.rsqrt.default):
        return True
    if is_call(node, aten.sqrt.default) or (
        is_call(node, aten.pow.Tensor_Scalar) and node.args[1] in (0.5, -0.5)
    ):
        return is_call(node.args[0], *_ADDS) or _is_of_squares(node.args[0])
    others = (aten.pow.Tensor_Scalar, aten.reciprocal.default, aten.log.default)
    if not is_call(node, *others) or is_call(node.args[0], aten.sqrt.default):
        return False
    return node.args[1:] != (2,) and _is_of_squares(node.args[0])


def _is_of_squares(value: object) -> bool:
    """A mean or sum of squares, or a variance, with numbers applied to it."""
    while is_call(value, *_POINTWISE):
        value = value.args[0]  # type: ignore[attr-defined]
    if is_call(value, *_VARIANCES):
        return True
    square = value.args[0] if is_call(value, *_STATISTICS) else None  # type: ignore[attr-defined]
    return isinstance(square, fx.Node) and _squared(square) is not None


def read_factor(root: fx.Node) -> Factor | Reject:
    """Everything between x and the normalised x."""
    total, user = root.args[0], only_user(root)
    if not is_call(root, *_ROOTS) and root.args[1:] not in ((0.5,), (-0.5,)):
        return Reject(
            "other-root",
            f"expected a square root of the mean square, found {op_name(root)}",
            root,
            "use torch.rsqrt",
        )
    if not is_call(total, *_ADDS) and is_call(user, *_ADDS) and user is not None:
        return Reject(
            "epsilon-outside",
            "epsilon is added to the root, not under it",
            user,
            "add eps to the mean square before the root",
        )
    if not is_call(total, *_ADDS) or not isinstance(total, fx.Node) or total.kwargs:
        return Reject(
            "no-epsilon",
            "expected an added epsilon under the root",
            root,
            "add eps to the mean square before the root",
        )
    variance, eps = total.args[:2]
    if isinstance(eps, fx.Node):
        return Reject(
            "epsilon-tensor",
            "epsilon is a tensor, so its value is not known",
            total,
            "keep eps as a Python float",
        )
    if not isinstance(eps, (int, float)) or not isinstance(variance, fx.Node):
        return Reject("no-epsilon", f"expected mean + eps, found {total.args}", total)
    found = _statistics(variance)
    if isinstance(found, Reject):
        return found
    x, centred = found
    if len(variance.users) != 1 or len(total.users) != 1:
        return Reject("variance-used-elsewhere", "the variance has other users", variance)
    product = _product(root, x, centred)
    if isinstance(product, Reject):
        return product
    return Factor(product, x, float(eps), centred)


def _statistics(variance: fx.Node) -> tuple[fx.Node, bool] | Reject:
    """(x, centred) of mean(x^2, -1), mean((x - mean(x))^2, -1) or var(x, -1)."""
    if is_call(variance, *_VARIANCES):
        return _of_variance(variance)
    if not is_call(variance, aten.mean.dim):
        return Reject(
            "no-mean",
            f"expected a mean under the root, found {op_name(variance)}",
            variance,
            "spell the mean square as x.pow(2).mean(-1, keepdim=True)",
        )
    square = variance.args[0]
    assert isinstance(square, fx.Node)
    if not is_last_axis(square, argument(variance, "dim")) or not argument(variance, "keepdim"):
        return Reject(
            "mean-axis", "the mean is not over the last axis with it kept", variance, _LAST_AXIS
        )
    if argument(variance, "dtype") not in (None, dtype_of(square)):
        return Reject("mean-dtype", "the mean is taken in another dtype than the square", variance)
    x = _squared(square)
    if x is None:
        return Reject("no-square", f"expected a square, found {op_name(square)}", square)
    original = _uncentred(x)
    return (x, False) if original is None else (original, True)


def _of_variance(variance: fx.Node) -> tuple[fx.Node, bool] | Reject:
    x = variance.args[0]
    assert isinstance(x, fx.Node)
    if not is_last_axis(x, argument(variance, "dim")) or not argument(variance, "keepdim"):
        return Reject(
            "mean-axis", "the variance is not over the last axis with it kept", variance, _LAST_AXIS
        )
    if is_call(variance, aten.var.dim):
        correction = 1 if argument(variance, "unbiased") else 0
    else:
        correction = argument(variance, "correction")
    if correction != 0:
        return Reject(
            "variance-unbiased",
            "the variance divides by D - 1",
            variance,
            "take the variance with unbiased=False",
        )
    # Shifting x does not change its variance.
    original = _uncentred(x)
    return (x if original is None else original), True


def _squared(square: fx.Node) -> fx.Node | None:
    is_square = (
        (is_call(square, aten.pow.Tensor_Scalar) and square.args[1] == 2)
        or (is_call(square, aten.mul.Tensor) and square.args[0] is square.args[1])
        or is_call(square, aten.square.default)
    )
    x = square.args[0] if is_square else None
    return x if isinstance(x, fx.Node) else None


def _uncentred(node: fx.Node) -> fx.Node | None:
    """x of x - mean(x, -1), None for anything else."""
    if not is_call(node, aten.sub.Tensor) or node.kwargs:
        return None
    x, mean = node.args
    if not isinstance(x, fx.Node) or not isinstance(mean, fx.Node):
        return None
    if not is_call(mean, aten.mean.dim) or mean.args[0] is not x:
        return None
    whole = is_last_axis(x, argument(mean, "dim")) and argument(mean, "keepdim")
    return x if whole and dtype_of(mean) == dtype_of(x) else None


def _product(root: fx.Node, x: fx.Node, centred: bool) -> fx.Node | Reject:
    """The multiplication or division that applies the root to x (minus its mean)."""
    inverse = is_call(root, aten.rsqrt.default) or root.args[1:] == (-0.5,)
    factor, user = root, only_user(root)
    if not inverse and user is not None and is_call(user, aten.reciprocal.default):
        factor, inverse, user = user, True, only_user(user)
    if user is not None and is_call(user, *CASTS):
        return Reject(
            "factor-cast",
            "the factor is rounded before it scales x",
            user,
            "cast after the multiplication",
        )
    elsewhere = Reject("factor-used-elsewhere", "the factor is not only used to scale x", root)
    if user is None:
        return elsewhere
    if inverse and is_call(user, aten.mul.Tensor):
        value = user.args[1] if user.args[0] is factor else user.args[0]
    elif not inverse and is_call(user, aten.div.Tensor) and user.args[1] is factor:
        value = user.args[0]
    else:
        return elsewhere
    if not isinstance(value, fx.Node) or dtype_of(user) != dtype_of(x):
        return elsewhere
    if centred:
        original = _uncentred(value)
        return user if original is x else elsewhere
    return user if value in (x, uncast(x)) else elsewhere
