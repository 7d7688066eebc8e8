"""What a mask says: attributes of the attention op where proven, operands where not.

The visible condition is a conjunction; each part of it is one of

    key <= query, key > query - w                         attributes causal and window
    something of (batch, key) alone                        the padding operand
    anything over indices and small tensors                the predicate attribute with its `aux`
    an element of a [.., query, key] tensor                the dense mask operand, with the reason

The proof is structural: the algebra's normal form of the part equals that of the meaning, for all
sizes. As a second, independent test `grid.py` computes the mask's own nodes on small adversarial
grids and compares.

What a hidden key's score becomes goes along as `hidden`, so that a query that sees nothing gets
what the model gives it. It is left out where every query surely sees a key and the value is so low
that a hidden key weighs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, fx

from graphopt.ir.graph import Graph
from graphopt.passes.analysis.masks import algebra as ia
from graphopt.passes.analysis.masks.algebra import Expr, Read, Var
from graphopt.passes.analysis.masks.arithmetic import ARITHMETIC
from graphopt.passes.analysis.masks.numbers import NUMBERS, pointwise
from graphopt.passes.analysis.masks.predicate_text import UnwrittenError, text
from graphopt.passes.analysis.masks.scores import MASK, SCORE, beside, is_negligible
from graphopt.passes.analysis.masks.values import MaskValues, as_kind, axis
from graphopt.passes.analysis.masks.views import MOVING

_NAMES = ("b", "h", "q", "k")
# A predicate may index tensors by two of b, h, q, k (tokens of a batch element), a bias by one.
_MOST_INDICES = {"bool": 2, "float": 1}
_NOTHING = ia.real(float("-inf"))
_ROUNDING = {torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True, slots=True)
class MaskMeaning:
    """Arguments of `graphopt::attention`. why_dense: code and text, when `mask` is set.

    padding, hiding: nodes of which all and none hold where the padding operand does. hidden,
    empty_is_nan: as of the op.
    low: `hidden`, also where it is left out because it does not matter; "-inf" by default.
    bits: inputs that hold zeros and ones, if the meaning is right.
    """

    causal: bool = False
    window: int = 0
    padding: tuple[fx.Node, ...] = ()
    hiding: tuple[fx.Node, ...] = ()
    predicate: str = ""
    bias: str = ""
    aux: tuple[fx.Node, ...] = ()
    mask: fx.Node | None = None
    why_dense: str = ""
    hidden: str = ""
    empty_is_nan: bool = False
    low: str = "-inf"
    bits: tuple[str, ...] = ()

    @property
    def hides(self) -> bool:
        """True when some key may be hidden from some query."""
        parts = (self.causal, self.window, self.padding, self.hiding, self.predicate)
        return any(parts) or (self.mask is not None and self.mask.meta["val"].dtype == torch.bool)


@dataclass(frozen=True, slots=True)
class Hidden:
    """What the score of a hidden key becomes.

    score: in terms of `scores.SCORE`, None when it cannot be said. rounded: the dtype in which the
    model keeps it. is_safe: rows of -inf alone give zeros instead of nan, as in SDPA.
    """

    score: Expr | None
    rounded: torch.dtype = torch.float32
    is_safe: bool = False


@dataclass(frozen=True, slots=True)
class Unproven:
    """A mask that cannot be expressed by the op's arguments."""

    code: str
    text: str


_Conjuncts: TypeAlias = tuple[bool, int, list[fx.Node], list[fx.Node], list[Expr]]
"""causal, window, padding, hiding, other conditions."""


def reader(graph: Graph) -> MaskValues:
    """Index algebra of a graph's nodes."""
    return MaskValues(graph, {**ARITHMETIC, **MOVING, **NUMBERS}, pointwise)


class _Meaning:
    """Builds one meaning. sizes: of the scores' four axes."""

    def __init__(self, values: MaskValues, sizes: Sequence[Expr]) -> None:
        self.values = values
        self.sizes = tuple(sizes)
        self.queries, self.keys = sizes[2], sizes[3]
        self.gap = ia.add(self.keys, self.queries, -1)
        self.aux: list[fx.Node] = []

    def read(self, visible: Expr, bias: Expr | None, hidden: Hidden) -> MaskMeaning | Unproven:
        causal, window, padding, hiding, other = self._conjuncts(visible)
        predicates, dense = [], []
        for part in other:
            written = self._text(part)
            if written is None:
                dense.append(part)
            else:
                predicates.append(written)
        bias_text, bias_node, low = "", None, hidden.score
        if bias is not None and axis(3) not in ia.variables(bias):
            # The same for all keys: the softmax does not see it, but for the hidden ones.
            low = None if low is None else beside(low, bias)
        elif bias is not None:
            bias_text = self._text(bias) or ""
            bias_node = None if bias_text else self._node_of(bias, "float", rank=4)
            if not bias_text and bias_node is None:
                bias_text = self._text(bias, by_key=True) or ""
            if not bias_text and bias_node is None:
                return Unproven("bias-not-a-tensor", "the bias is no tensor of the graph")
        mask = bias_node
        if dense:
            if mask is not None:
                return Unproven("mask-and-bias", "a dense mask and a dense bias together")
            mask = self._node_of(ia.all_of(*dense), "bool", rank=4)
            if mask is None:
                return Unproven(
                    "mask-not-proven", f"the mask has no known meaning: {_brief(dense)}"
                )
        all_see = not (padding or hiding or dense) and self._all_see(causal, window, other)
        if bias is not None and axis(3) in ia.variables(bias) and ia.reads(bias):
            # It may be minus infinity for every key that a query sees.
            all_see = False
        if low is None:
            return Unproven("hidden-not-read", "what a hidden score becomes cannot be told")
        low_text = self._low_text(low, bias if bias_node is not None else None, hidden.rounded)
        if low_text is None:
            return Unproven("hidden-not-read", f"what a hidden score becomes: {_brief([low])}")
        is_idle = low == _NOTHING or (all_see and is_negligible(low))
        return MaskMeaning(
            causal,
            window,
            tuple(padding),
            tuple(hiding),
            " and ".join(f"({p})" if " or " in p else p for p in predicates),
            bias_text,
            tuple(self.aux),
            mask,
            self._why(bias_node, dense),
            "" if is_idle else low_text,
            not (all_see or hidden.is_safe or _is_finite(low)),
            low_text,
        )

    def _low_text(self, low: Expr, dense_bias: Expr | None, rounded: torch.dtype) -> str | None:
        """`low` in the op's language; `dense_bias`: what the mask operand holds."""
        if dense_bias is not None:
            low = _exchanged(low, dense_bias, MASK)
        kept = list(self.aux)
        name = _ROUNDING.get(rounded)
        # Where the type's own limit is added, rounding changes nothing that this type can hold.
        is_rounded = name is not None and SCORE in ia.variables(low) and not is_negligible(low)
        written = self._text(ia.Call(str(name), (low,)) if is_rounded else low, most_indices=4)
        if written is None:
            self.aux = kept
        return written

    def _why(self, bias_node: fx.Node | None, dense: list[Expr]) -> str:
        if bias_node is not None:
            return "bias-from-data: the bias depends on more than indices"
        return f"mask-not-proven: no known meaning: {_brief(dense)}" if dense else ""

    def _conjuncts(self, visible: Expr) -> _Conjuncts:
        b, q, k = axis(0), axis(2), axis(3)
        # Distance from a key to the query's own position: >= 0 for the past.
        distance = ia.add(ia.add(q, k, -1), self.gap)
        causal, window, ahead = False, 0, 0
        padding: list[fx.Node] = []
        hiding: list[fx.Node] = []
        other: list[Expr] = []
        limits: dict[Var, Expr] = {
            q: ia.add(self.queries, ia.integer(-1)),
            k: ia.add(self.keys, ia.integer(-1)),
        }
        for part in ia.conjuncts(visible):
            if isinstance(part, ia.Call) and part.op == "ge0":
                low = ia.smallest(part.args[0], limits)
                if low is not None and low >= 0:
                    continue
                past = ia.add(part.args[0], distance, -1)
                if past == ia.integer(0):
                    causal = True
                    continue
                width = ia.add(part.args[0], distance)
                if isinstance(width, ia.Num) and int(width.value) >= 0 and not window:
                    window = int(width.value) + 1
                    continue
                if isinstance(past, ia.Num) and int(past.value) > 0 and not ahead:
                    ahead = int(past.value) + 1
                    continue
            if ia.reads(part) and k in ia.variables(part) and ia.variables(part) <= {b, k}:
                node = self._node_of(part, "bool", rank=2) or self._broadcast(part)
                if node is not None:
                    padding.append(node)
                    continue
                node = self._node_of(ia.negate(part), "bool", rank=2)
                if node is not None:
                    hiding.append(node)
                    continue
            other.append(part)
        if ahead and (causal or ahead != window):
            if not causal:
                other.append(ia.at_least_zero(ia.add(distance, ia.integer(ahead - 1))))
        elif window and not causal and not ahead:
            other.append(ia.at_least_zero(ia.add(ia.integer(window - 1), distance, -1)))
            window = 0
        if ahead and not causal and ahead != window and window:
            other.append(ia.at_least_zero(ia.add(ia.integer(window - 1), distance, -1)))
            window = 0
        return causal, window, padding, hiding, other

    def _all_see(self, causal: bool, window: int, other: list[Expr]) -> bool:
        """Every query sees the key at its own position or the first one."""
        if (causal or window) and self.gap != ia.integer(0):
            low = ia.smallest(self.gap, {})
            if low is None or low < 0:
                return False
        surely_seen: list[Expr] = [ia.add(axis(2), self.gap)]
        if not window:
            surely_seen.append(ia.integer(0))
        return any(
            all(ia.substitute(p, {axis(3): key}) == ia.TRUE for p in other) for key in surely_seen
        )

    def _broadcast(self, e: Expr) -> fx.Node | None:
        """A boolean node of more axes, `[B, 1, 1, T]`, that holds a function of (batch, key)."""
        node, one = self._node_of(e, "bool", rank=4), ia.integer(1)
        sizes = () if node is None else self.values.of(node).sizes
        between = len(sizes) > 2 and all(size == one for size in sizes[1:-1])
        is_whole = between and (sizes[0], sizes[-1]) == (self.sizes[0], self.keys)
        return node if is_whole and self.sizes[0] != one else None

    def _node_of(self, e: Expr, kind: str, rank: int) -> fx.Node | None:
        """A node that holds `e`: `[B, T]` for rank 2, broadcastable to `[B, H, S, T]` for 4."""
        for node in self.values.nodes():
            value = node.meta["val"]
            if not isinstance(value, Tensor) or not 2 <= value.ndim <= 4:
                continue
            if (value.ndim != 2) if rank == 2 else (kind != _kind_of(value)):
                continue
            grid = self.values.of(node)
            wanted = self.sizes[4 - value.ndim :] if rank == 4 else (self.sizes[0], self.keys)
            one = ia.integer(1)
            if any(own not in (one, size) for own, size in zip(grid.sizes, wanted, strict=True)):
                continue
            if rank == 4:
                element = self.values.element(node, self.sizes)
            elif grid.sizes[1] == self.keys:
                element = ia.substitute(grid.element, {axis(1): axis(3)})
            else:
                continue
            if element is not None and as_kind(self.values, element, kind, value.dtype) == e:
                return node
        return None

    def _within(self, read: Read, node: fx.Node) -> bool:
        """Every index is one of the tensor's, whatever b, h, q and k are."""
        limits = {
            axis(i): ia.add(size, ia.integer(-1))
            for i, size in enumerate(self.sizes)
            if size != ia.integer(1)
        }
        for index, size in zip(read.indices, self.values.of(node).sizes, strict=True):
            for rest in (index, ia.add(ia.add(size, ia.integer(-1)), index, -1)):
                low = ia.smallest(rest, limits)
                if low is None or low < 0:
                    return False
        return True

    def _text(self, e: Expr, by_key: bool = False, most_indices: int = 0) -> str | None:
        """The predicate's text; None when it would read tensors that are not small. by_key: what
        is the same for all queries may be read by batch, head and key."""
        order: dict[str, int] = {}
        for read in sorted(ia.reads(e), key=repr):
            node = self.values.named(read.tensor)
            varying = [i for i in read.indices if ia.variables(i)]
            is_small = len(varying) <= (most_indices or _MOST_INDICES[ia.kind_of(e)])
            is_small = is_small or (by_key and axis(2) not in ia.variables(read))
            if node is None or not is_small:
                return None
            if not self._within(read, node):
                return None
            if node not in self.aux:
                self.aux.append(node)
            order[read.tensor] = self.aux.index(node)
        named: dict[Var, Expr] = {axis(i): Var(name) for i, name in enumerate(_NAMES)}
        # In the text a query is named by its position among the keys.
        named[axis(2)] = ia.add(Var("q"), self.gap, -1)
        for size, name in ((self.queries, "S"), (self.keys, "T")):
            if isinstance(size, Var):
                named.setdefault(size, Var(name, size=True))
        renamed = _renamed(ia.substitute(e, named), order)
        unknown = {v for v in _sizes(renamed) if v.name not in ("S", "T")}
        if unknown:
            return None
        try:
            return text(renamed)
        except UnwrittenError:
            return None


def _kind_of(value: Tensor) -> str:
    return "float" if value.dtype.is_floating_point else "bool" if value.dtype == torch.bool else ""


def _renamed(e: Expr, order: dict[str, int]) -> Expr:
    if isinstance(e, Read):
        indices = tuple(_renamed(i, order) for i in e.indices)
        return Read(f"aux{order[e.tensor]}", indices, e.kind)
    if isinstance(e, ia.Sum):
        return ia.linear({_renamed(a, order): c for a, c in e.terms}, e.constant)
    if isinstance(e, ia.Call):
        return ia.rebuild(e.op, tuple(_renamed(a, order) for a in e.args))
    return e


def _is_finite(e: Expr) -> bool:
    if isinstance(e, ia.Call) and e.op == "add" and e.args[0] == SCORE:
        e = e.args[1]
    return isinstance(e, ia.Num) and e != _NOTHING


def _exchanged(e: Expr, old: Expr, new: Expr) -> Expr:
    if e == old or not isinstance(e, ia.Call):
        return new if e == old else e
    return ia.Call(e.op, tuple(_exchanged(a, old, new) for a in e.args))


def _sizes(e: Expr) -> frozenset[Var]:
    if isinstance(e, Var):
        return frozenset({e}) if e.size else frozenset()
    if isinstance(e, ia.Num):
        return frozenset()
    children = e.indices if isinstance(e, Read) else ia.children(e)
    return frozenset().union(*(_sizes(child) for child in children))


def _brief(parts: list[Expr]) -> str:
    try:
        written = " and ".join(map(text, parts))
    except UnwrittenError as unwritten:
        return f"it holds {unwritten}"
    return written if len(written) < 120 else f"{written[:117]}..."


def read_meaning(
    values: MaskValues, visible: Expr, bias: Expr | None, hidden: Hidden, sizes: Sequence[Expr]
) -> MaskMeaning | Unproven:
    """The meaning of a condition and a bias in a0..a3. sizes: of the scores' four axes."""
    return _Meaning(values, sizes).read(visible, bias, hidden)
