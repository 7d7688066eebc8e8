"""What stands between `q @ k^T` and the softmax, read as algebra instead of as a chain of nodes.

The input of the softmax is a tree of `where` over leaves. A leaf is hidden (a very negative
number, or one added to something), or an affine function of the product S:

    softcap * tanh(S * scale / softcap) + bias        or        S * scale + bias

`read_scores` gives the condition under which a key is visible, the common scale, softcap and
bias of the visible leaves, however the model spells them, and what the hidden leaves hold.

That a leaf counts as hidden assumes nothing: its value goes along, in terms of the score `SCORE`,
and the op gives a hidden key this value. It may be left out where `is_negligible` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from graphopt.ops.attention import NEGLIGIBLE
from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks.algebra import Expr, Read, Var

HIDDEN = -1e4
"""A leaf with a number this low is read as hidden, its value kept."""
SCORE, MASK = Var("s"), Var("mask")
"""The score before mask and bias, and the mask operand's element, in what hidden leaves hold."""


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
    """visible: condition in a0..a3. hidden: what is there elsewhere, None when it cannot be said in
    terms of SCORE. The rest: of the visible leaves."""

    visible: Expr
    scale: float
    softcap: float
    bias: Expr | None
    hidden: Expr | None
    factor: Factor | None = None


@dataclass(frozen=True, slots=True)
class Unread:
    """Why the softmax's input is no masked, scaled product."""

    code: str
    text: str


def read_scores(element: Expr, product: Read) -> Scores | Unread:
    """Take the softmax's input apart. product: what the algebra calls `q @ k^T`."""
    visible, leaf, low = _split(element)
    if leaf is None:
        return Unread("nothing-visible", "the mask hides every key")
    affine = _affine(leaf, product)
    if isinstance(affine, Unread):
        return affine
    if affine is None or affine.bounded or affine.scale == 0.0:
        return Unread("not-scores", "the softmax is not over a scaled product of two tensors")
    hidden = _NOTHING if low is None else _hidden(low, product, affine)
    return Scores(visible, affine.scale, affine.softcap, affine.bias, hidden, affine.factor)


def read_additive(element: Expr) -> tuple[Expr, Expr | None, Expr]:
    """(visible, bias, hidden) of a mask on its own: booleans, or numbers that are added to scores.

    hidden: as in `Scores`."""
    if ia.kind_of(element) == "bool":
        return element, None, _NOTHING
    visible, bias, low = _split(element)
    if low is None or _swallows(low):
        return visible, bias, _NOTHING if low is None else low
    return visible, bias, ia.Call("add", (SCORE, low))


def is_negligible(hidden: Expr) -> bool:
    """True when a key that holds this weighs nothing beside one that is seen."""
    if not isinstance(hidden, ia.Call):
        return _swallows(hidden)
    if hidden.op == "where":
        return all(map(is_negligible, hidden.args[1:]))
    if hidden.op == "sub":
        return is_negligible(hidden.args[0])
    return hidden.op == "add" and any(map(is_negligible, hidden.args))


def beside(hidden: Expr, dropped: Expr) -> Expr:
    """What hidden leaves hold when `dropped`, the same for all keys, is not added to the others."""
    if dropped == ia.real(0):
        return hidden
    if isinstance(hidden, ia.Call) and hidden.op == "add" and hidden.args[0] == SCORE:
        return ia.Call("add", (SCORE, ia.Call("sub", (hidden.args[1], dropped))))
    return ia.Call("sub", (hidden, dropped))


def _hidden(low: Expr, product: Read, shown: Affine) -> Expr | None:
    """What the hidden leaves hold, in terms of SCORE; as `SCORE + x` where all of them do."""
    moved = _over(low, lambda leaf: _moved_by(leaf, product, shown))
    if moved is not None:
        return moved if _swallows(moved) else ia.Call("add", (SCORE, moved))
    return _over(low, lambda leaf: _held(leaf, product, shown))


def _over(e: Expr, function: Callable[[Expr], Expr | None]) -> Expr | None:
    if isinstance(e, ia.Call) and e.op == "where":
        yes, no = (_over(side, function) for side in e.args[1:])
        return None if yes is None or no is None else ia.choose(e.args[0], yes, no)
    return function(e)


def _moved_by(leaf: Expr, product: Read, shown: Affine) -> Expr | None:
    """x of `score + x`; also of a number that is the same whatever score is added."""
    own = _affine(leaf, product)
    if _swallows(leaf):
        return leaf
    if not isinstance(own, Affine) or own.bounded:
        return None
    is_same = replace(own, bias=None) == replace(shown, bias=None)
    return (ia.real(0) if own.bias is None else own.bias) if is_same else None


def _swallows(e: Expr) -> bool:
    return isinstance(e, ia.Num) and float(e.value) <= NEGLIGIBLE


def _held(leaf: Expr, product: Read, shown: Affine) -> Expr | None:
    if product not in ia.reads(leaf):
        return leaf
    own = _affine(leaf, product)
    is_bounded = not isinstance(own, Affine) or own.bounded or own.softcap or shown.softcap
    if is_bounded or not isinstance(own, Affine) or own.factor != shown.factor:
        moved = _moved_by(leaf, product, shown)
        return None if moved is None else ia.Call("add", (SCORE, moved))
    ratio = own.scale / shown.scale
    score = SCORE if ratio == 1.0 else ia.Call("mul", (SCORE, ia.real(ratio)))
    return score if own.bias is None else ia.Call("add", (score, own.bias))


_NOTHING = ia.real(float("-inf"))


def shows_nothing(element: Expr) -> bool:
    """True when every key is hidden."""
    return _split(element)[0] == ia.FALSE


def adds(element: Expr) -> bool:
    """True when all that hides keys is added to the scores, or leaves nothing of any score: what
    the softmax gets is then the scores plus what it gets for scores of zero, in every row."""
    if isinstance(element, ia.Call) and element.op == "where":
        return all(map(adds, element.args[1:]))
    return not _is_hidden(element) or isinstance(element, ia.Call) or _swallows(element)


def _is_hidden(e: Expr) -> bool:
    if isinstance(e, ia.Num):
        return e.kind == "float" and float(e.value) <= HIDDEN
    if isinstance(e, ia.Call) and e.op == "add":
        return any(_is_hidden(part) for part in e.args)
    return isinstance(e, ia.Call) and e.op == "sub" and _is_hidden(e.args[0])


def _split(e: Expr) -> tuple[Expr, Expr | None, Expr | None]:
    """(visible, the value where visible, the value where hidden)."""
    if isinstance(e, ia.Call) and e.op == "where":
        condition, *sides = e.args
        (see_yes, yes, low_yes), (see_no, no, low_no) = (_split(side) for side in sides)
        visible = ia.choose(condition, see_yes, see_no)
        return visible, _either(condition, yes, no), _either(condition, low_yes, low_no)
    return (ia.FALSE, None, e) if _is_hidden(e) else (ia.TRUE, e, None)


def _either(condition: Expr, yes: Expr | None, no: Expr | None) -> Expr | None:
    """The value where there is one; it does not matter elsewhere."""
    if yes is None or no is None:
        return no if yes is None else yes
    return ia.choose(condition, yes, no)


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
