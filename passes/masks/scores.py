"""What stands between `q @ k^T` and the softmax, read as algebra instead of as a chain of nodes.

The input of the softmax is a tree of `where` over leaves. A leaf is hidden (a very negative
number, or one added to something), or an affine function of the product S:

    softcap * tanh(S * scale / softcap) + bias        or        S * scale + bias

`read_scores` gives the condition under which a key is visible and the common scale, softcap and
bias of the visible leaves, however the model spells them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from graphopt.passes.masks import algebra as ia
from graphopt.passes.masks.algebra import Expr, Read

HIDDEN = -1e4
"""A number this low, added to a score, leaves nothing after the exponential."""


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor (op "mul") or divisor ("div") of the scores that is no number: learned for each
    head, or computed."""

    op: str
    value: Expr


@dataclass(frozen=True, slots=True)
class Affine:
    """scale * S + bias, or softcap * tanh(S * scale / softcap) + bias. bounded: tanh was applied
    and its factor is not known yet. factor: of S too, in the first form."""

    scale: float
    softcap: float = 0.0
    bias: Expr | None = None
    bounded: bool = False
    factor: Factor | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """visible: condition in a0..a3. The rest: of the visible leaves."""

    visible: Expr
    scale: float
    softcap: float
    bias: Expr | None
    factor: Factor | None = None


@dataclass(frozen=True, slots=True)
class Unread:
    """Why the softmax's input is no masked, scaled product."""

    code: str
    text: str


def read_scores(element: Expr, product: Read) -> Scores | Unread:
    """Take the softmax's input apart. product: what the algebra calls `q @ k^T`."""
    visible, leaf = _split(element)
    if leaf is None:
        return Unread("nothing-visible", "the mask hides every key")
    affine = _affine(leaf, product)
    if isinstance(affine, Unread):
        return affine
    if affine is None or affine.bounded or affine.scale == 0.0:
        return Unread("not-scores", "the softmax is not over a scaled product of two tensors")
    return Scores(visible, affine.scale, affine.softcap, affine.bias, affine.factor)


def read_additive(element: Expr) -> tuple[Expr, Expr | None]:
    """(visible, bias) of a mask on its own: booleans, or numbers that are added to scores."""
    if ia.kind_of(element) == "bool":
        return element, None
    visible, bias = _split(element)
    return visible, None if bias is None or isinstance(bias, ia.Num) else bias


def shows_nothing(element: Expr) -> bool:
    """True when every key is hidden."""
    return _split(element)[0] == ia.FALSE


def keeps_rows(element: Expr) -> bool:
    """True when a finite number added to the scores is all that hides keys: a query that sees
    nothing then still tells its keys apart."""
    if isinstance(element, ia.Call) and element.op == "where":
        return all(map(keeps_rows, element.args[1:]))
    if not _is_hidden(element):
        return True
    return isinstance(element, ia.Call) and all(
        math.isfinite(part.value) for part in element.args if isinstance(part, ia.Num)
    )


def _is_hidden(e: Expr) -> bool:
    if isinstance(e, ia.Num):
        return e.kind == "float" and float(e.value) <= HIDDEN
    if isinstance(e, ia.Call) and e.op == "add":
        return any(_is_hidden(part) for part in e.args)
    return isinstance(e, ia.Call) and e.op == "sub" and _is_hidden(e.args[0])


def _split(e: Expr) -> tuple[Expr, Expr | None]:
    """(visible, the value where visible)."""
    if isinstance(e, ia.Call) and e.op == "where":
        condition, *sides = e.args
        (see_yes, yes), (see_no, no) = (_split(side) for side in sides)
        visible = ia.choose(condition, see_yes, see_no)
        if yes is None or no is None:
            return visible, no if yes is None else yes
        return visible, ia.choose(condition, yes, no)
    return (ia.FALSE, None) if _is_hidden(e) else (ia.TRUE, e)


def _affine(e: Expr, product: Read) -> Affine | Unread | None:
    """The leaf in terms of the product; None when it is not in it."""
    if e == product:
        return Affine(1.0)
    if not isinstance(e, ia.Call):
        return None
    if e.op == "where":
        return _chosen(e, product)
    parts = [_affine(a, product) for a in e.args]
    for part in parts:
        if isinstance(part, Unread):
            return part
    found = [p for p in parts if isinstance(p, Affine)]
    if not found:
        return None
    if len(found) > 1:
        return Unread("not-scores", f"{e.op} of the scores with themselves")
    inner = found[0]
    others = [a for a, p in zip(e.args, parts, strict=True) if p is None]
    if e.op == "tanh" and inner.bias is None and not inner.softcap and not inner.bounded:
        return Affine(inner.scale, bounded=True) if inner.factor is None else _unread(e)
    if e.op in ("mul", "div") and isinstance(others[0], ia.Num):
        factor = float(others[0].value)
        if e.op == "div" and (parts[0] is None or factor == 0.0):
            return Unread("not-scores", "a division by the scores or by zero")
        return _scaled(inner, factor if e.op == "mul" else 1.0 / factor)
    if e.op in ("mul", "div") and (e.op == "mul" or parts[0] is not None):
        is_plain = inner == Affine(inner.scale)
        return replace(inner, factor=Factor(e.op, others[0])) if is_plain else _unread(e)
    if e.op in ("add", "sub") and not (e.op == "sub" and parts[0] is None) and not inner.bounded:
        more = others[0]
        if e.op == "sub":
            more = ia.Call("mul", (more, ia.real(-1)))
        bias = more if inner.bias is None else ia.Call("add", (inner.bias, more))
        return replace(inner, bias=bias)
    return _unread(e)


def _unread(e: ia.Call) -> Unread:
    return Unread("not-scores", f"{e.op} between the product and the softmax")


def _scaled(inner: Affine, factor: float) -> Affine | Unread:
    if inner.bounded:
        if factor <= 0:
            return Unread("not-scores", "a softcap that is not positive")
        return Affine(inner.scale * factor, factor)
    if inner.softcap:
        return Unread("scale-after-softcap", "scores are scaled after their softcap")
    bias = None if inner.bias is None else ia.Call("mul", (inner.bias, ia.real(factor)))
    return replace(inner, scale=inner.scale * factor, bias=bias)


def _chosen(e: ia.Call, product: Read) -> Affine | Unread | None:
    condition, *sides = e.args
    yes, no = (_affine(side, product) for side in sides)
    for part in (yes, no):
        if isinstance(part, Unread):
            return part
    if yes is None and no is None:
        return None
    if not isinstance(yes, Affine) or not isinstance(no, Affine):
        return Unread("masked-fill", "the value that is filled in does not hide a key")
    if replace(yes, bias=None) != replace(no, bias=None):
        return Unread("not-scores", "scores are scaled differently in different places")
    zero = ia.real(0)
    bias = ia.choose(condition, *(zero if a.bias is None else a.bias for a in (yes, no)))
    return replace(yes, bias=bias)
