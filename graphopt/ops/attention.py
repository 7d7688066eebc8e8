"""graphopt::attention, the one attention op every recogniser ends in.

    out_BHSE = softmax(softcap(q_BHSD @ k_BGTD^T * scale) + mask + bias) @ v_BGTE

Head h reads key/value head `h // (H // G)`. Query i sits at key position `i + T - S`. A key is
visible when every stated condition holds: causal (key <= query), window (key > query - window; not
causal: also key < query + window), `pad_BT` true, `predicate`, and `mask` (bool: true = visible;
float: added). `predicate` and `bias` are expressions of `graphopt.ops.predicate` over b, h, q, k
and the tensors `aux`. `sinks_H` is one more logit per head that takes part in the softmax and has
no value.

A hidden key's score is -inf, or the expression `hidden`, which may also name `s`, the score before
mask and bias, and `mask`, the mask's own element: "-1e9" for a mask that is filled in, "s - 1e4"
for one that is added. So a query that sees nothing gives what the model gives: a mean over all keys
where they were filled alike, the plain softmax where all were moved alike. Where every score is
-inf the result is zero, or nan if `empty_is_nan`, as of a softmax.

The reference works on blocks of queries: without a dense mask its memory grows with the sequence,
not with its square.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.ir.opset import Cost, define, nbytes
from graphopt.ops import operands
from graphopt.ops import predicate as language

SCHEMA = (
    "attention(Tensor q_BHSD, Tensor k_BGTD, Tensor v_BGTE, Tensor? mask=None, "
    "Tensor? pad_BT=None, Tensor? sinks_H=None, Tensor[]? aux=None, *, float scale, "
    'bool causal=False, int window=0, float softcap=0.0, str predicate="", str bias="", '
    'str hidden="", bool empty_is_nan=False) -> Tensor'
)
BLOCK = 256
NEGLIGIBLE = -1e30
"""A key whose score becomes this or less weighs nothing beside one that is seen: scores of this
size, which could tell, would leave float32 in the product already."""


def softmax(scores_BHST: Tensor, sinks_H: Tensor | None, empty_is_nan: bool) -> Tensor:
    """Softmax over the last axis; rows of -inf alone are 0, or nan."""
    peak = scores_BHST.amax(-1, keepdim=True)
    if sinks_H is not None:
        peak = torch.maximum(peak, sinks_H.to(peak.dtype).view(1, -1, 1, 1))
    if not empty_is_nan:
        peak = peak.masked_fill(peak == float("-inf"), 0.0)
    weights = torch.exp(scores_BHST - peak)
    total = weights.sum(-1, keepdim=True)
    if sinks_H is not None:
        total = total + torch.exp(sinks_H.to(peak.dtype).view(1, -1, 1, 1) - peak)
    return weights / total.masked_fill(total == 0.0, 1.0)


def scores(q_BHRD: Tensor, k_BHTD: Tensor, scale: float, softcap: float) -> Tensor:
    """`[B, H, R, T]` before mask and bias, in the dtype of the keys."""
    found_BHRT = q_BHRD.to(k_BHTD.dtype) @ k_BHTD.transpose(-1, -2) * scale
    return softcap * torch.tanh(found_BHRT / softcap) if softcap else found_BHRT


def reference(
    q_BHSD: Tensor,
    k_BGTD: Tensor,
    v_BGTE: Tensor,
    mask: Tensor | None = None,
    pad_BT: Tensor | None = None,
    sinks_H: Tensor | None = None,
    aux: Sequence[Tensor] | None = None,
    *,
    scale: float,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    predicate: str = "",
    bias: str = "",
    hidden: str = "",
    empty_is_nan: bool = False,
) -> Tensor:
    """The definition, scores in float32 (float64 stays float64)."""
    b, h, queries, _d = q_BHSD.shape
    groups, keys = h // k_BGTD.shape[1], k_BGTD.shape[2]
    working = torch.promote_types(q_BHSD.dtype, torch.float32)
    v_BHTE = v_BGTE.to(working).repeat_interleave(groups, 1)
    k_BHTD = k_BGTD.to(working).repeat_interleave(groups, 1)
    sizes = (b, h, queries, keys)
    masks = Masks(sizes, mask, pad_BT, aux or (), causal, window, predicate, bias, hidden)
    out_BHSE = q_BHSD.new_empty((b, h, queries, v_BGTE.shape[-1]))
    for start in range(0, queries, BLOCK):
        rows = range(start, min(start + BLOCK, queries))
        scores_BHRT = scores(q_BHSD[:, :, rows.start : rows.stop], k_BHTD, scale, softcap)
        weights_BHRT = softmax(masks.applied(scores_BHRT, rows), sinks_H, empty_is_nan)
        out_BHSE[:, :, rows.start : rows.stop] = weights_BHRT @ v_BHTE
    return out_BHSE


@dataclass(frozen=True, slots=True)
class Masks:
    """Everything that hides keys or is added to scores. sizes: B, H, S, T."""

    sizes: tuple[int, int, int, int]
    mask: Tensor | None
    pad_BT: Tensor | None
    aux: Sequence[Tensor]
    causal: bool
    window: int
    predicate: str
    bias: str
    hidden: str

    def applied(self, scores_BHRT: Tensor, rows: range) -> Tensor:
        """What the softmax is taken of, for the scores of some queries."""
        device, dtype = scores_BHRT.device, scores_BHRT.dtype
        added, visible = self._of(rows, device, dtype)
        if visible is None:
            return scores_BHRT if added is None else scores_BHRT + added
        moved_by = language.added_to("s", self.hidden)
        names = {} if self.mask is None else {"mask": self._mask_of(rows)}
        if moved_by is not None:
            shift = self._value(moved_by, rows, device, dtype, names)
            shown = torch.zeros((), dtype=dtype, device=device) if added is None else added
            return scores_BHRT + torch.where(visible, shown, shift)
        shown = scores_BHRT if added is None else scores_BHRT + added
        if not self.hidden:
            return shown.masked_fill(~visible, float("-inf"))
        low = self._value(self.hidden, rows, device, dtype, {**names, "s": scores_BHRT})
        return (
            shown.masked_fill(~visible, low) if low.ndim == 0 else torch.where(visible, shown, low)
        )

    def _value(
        self,
        text: str,
        rows: range,
        device: torch.device,
        dtype: torch.dtype,
        names: Mapping[str, Tensor],
    ) -> Tensor:
        return language.evaluate(text, self.sizes, self.aux, rows, device, names).to(dtype)

    def _mask_of(self, rows: range) -> Tensor:
        assert self.mask is not None
        is_by_row = self.mask.ndim >= 2 and self.mask.shape[-2] != 1
        return self.mask[..., rows.start : rows.stop, :] if is_by_row else self.mask

    def _of(
        self, rows: range, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """(added to the scores, visible) of some queries, broadcastable to `[B, H, R, T]`."""
        queries, keys = self.sizes[2:]
        i_R1 = torch.arange(rows.start, rows.stop, device=device)[:, None] + (keys - queries)
        j_1T = torch.arange(keys, device=device)[None, :]
        added: list[Tensor] = []
        visible: list[Tensor] = []
        if self.causal:
            visible.append(j_1T <= i_R1)
        if self.window:
            visible.append(j_1T > i_R1 - self.window)
            if not self.causal:
                visible.append(j_1T < i_R1 + self.window)
        if self.pad_BT is not None:
            visible.append(self.pad_BT.bool()[:, None, None, :])
        if self.mask is not None:
            part = self._mask_of(rows)
            (visible if part.dtype == torch.bool else added).append(part)
        if self.predicate:
            visible.append(self._value(self.predicate, rows, device, torch.bool, {}))
        if self.bias:
            added.append(self._value(self.bias, rows, device, dtype, {}))
        return _combined(added, torch.add), _combined(visible, torch.logical_and)


def _combined(parts: list[Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    return functools.reduce(combine, parts) if parts else None


def check_groups(heads: operands.Size, groups: operands.Size) -> None:
    """Raise ValueError for query heads that key/value heads do not divide."""
    if isinstance(heads, int) and isinstance(groups, int):
        is_fine = groups > 0 and heads % groups == 0
        operands.require(is_fine, f"{heads} query heads cannot share {groups} key/value heads")


def fake(
    q_BHSD: Tensor,
    k_BGTD: Tensor,
    v_BGTE: Tensor,
    mask: Tensor | None = None,
    pad_BT: Tensor | None = None,
    sinks_H: Tensor | None = None,
    aux: Sequence[Tensor] | None = None,
    *,
    scale: float,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    predicate: str = "",
    bias: str = "",
    hidden: str = "",
    empty_is_nan: bool = False,
) -> Tensor:
    """Result `[B, H, S, E]` in the query's dtype."""
    operands.floats(q_BHSD=q_BHSD, k_BGTD=k_BGTD, v_BGTE=v_BGTE, sinks_H=sinks_H)
    operands.rank("q_BHSD", q_BHSD, 4)
    b, h, s, d = q_BHSD.shape
    operands.sizes("k_BGTD", k_BGTD, None, None, None, d)
    _b, groups, keys, _d = k_BGTD.shape
    operands.sizes("v_BGTE", v_BGTE, None, groups, keys, None)
    for name, batch in (("k_BGTD", k_BGTD.shape[0]), ("v_BGTE", v_BGTE.shape[0])):
        if not (isinstance(batch, int) and batch == 1):
            operands.size(f"axis 0 of {name}", batch, b)
    check_groups(h, groups)
    if mask is not None:
        operands.require(mask.ndim <= 4, f"mask has {mask.ndim} axes, at most 4")
        operands.require(mask.dtype == torch.bool or mask.is_floating_point(), "mask is no mask")
    if pad_BT is not None:
        operands.rank("pad_BT", pad_BT, 2)
        operands.size("axis 1 of pad_BT", pad_BT.shape[1], keys)
    if sinks_H is not None:
        operands.sizes("sinks_H", sinks_H, h)
    operands.finite(scale=scale, softcap=softcap)
    operands.least(0, window=window, softcap=softcap)
    more = {"s"} if mask is None else {"s", "mask"}
    for text, names in ((predicate, set()), (bias, set()), (hidden, more)):
        if text:
            language.check(text, len(aux or ()), frozenset(names))
    return q_BHSD.new_empty((b, h, s, v_BGTE.shape[-1]))


def cost(q_BHSD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, *_: object, **attributes: object) -> Cost:
    """Two matrix products; a causal square does half of the work."""
    b, h, s, d = q_BHSD.shape
    keys, e = k_BGTD.shape[2], v_BGTE.shape[-1]
    share = 0.5 if attributes.get("causal") else 1.0
    out_bytes = b * h * s * e * q_BHSD.element_size()
    return Cost(
        2.0 * b * h * s * keys * (d + e) * share, nbytes(q_BHSD, k_BGTD, v_BGTE) + out_bytes
    )


SPEC = define(SCHEMA, reference=reference, fake=fake, cost=cost)
