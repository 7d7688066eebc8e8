"""graphopt::attention, the one attention op every recogniser ends in.

    out_BHSE = softmax(softcap(q_BHSD @ k_BGTD^T * scale) + mask + bias) @ v_BGTE

Head h reads key/value head `h // (H // G)`. Query i sits at key position `i + T - S`. A key is
visible when every stated condition holds: causal (key <= query), window (key > query - window; not
causal: also key < query + window), `pad_BT` true, `predicate`, and `mask` (bool: true = visible;
float: added). `predicate` and `bias` are expressions of `graphopt.ops.predicate` over b, h, q, k
and the tensors `aux`. `sinks_H` is one more logit per head that takes part in the softmax and has
no value. A query that sees nothing gives zeros.

The reference works on blocks of queries: without a dense mask its memory grows with the sequence,
not with its square.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.ops import predicate as language
from graphopt.ops.registry import Cost, define, nbytes

SCHEMA = (
    "attention(Tensor q_BHSD, Tensor k_BGTD, Tensor v_BGTE, Tensor? mask=None, "
    "Tensor? pad_BT=None, Tensor? sinks_H=None, Tensor[]? aux=None, *, float scale, "
    'bool causal=False, int window=0, float softcap=0.0, str predicate="", str bias="") -> Tensor'
)
BLOCK = 256


def masked_softmax(scores_BHST: Tensor, visible: Tensor | None, sinks_H: Tensor | None) -> Tensor:
    """Softmax over the last axis; invisible keys get 0, rows without any visible key are 0."""
    if visible is not None:
        scores_BHST = scores_BHST.masked_fill(~visible, float("-inf"))
    peak = scores_BHST.amax(-1, keepdim=True)
    if sinks_H is not None:
        peak = torch.maximum(peak, sinks_H.to(peak.dtype).view(1, -1, 1, 1))
    peak = peak.masked_fill(peak == float("-inf"), 0.0)
    weights = torch.exp(scores_BHST - peak)
    total = weights.sum(-1, keepdim=True)
    if sinks_H is not None:
        total = total + torch.exp(sinks_H.to(peak.dtype).view(1, -1, 1, 1) - peak)
    return weights / total.masked_fill(total == 0.0, 1.0)


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
) -> Tensor:
    """The definition, scores in float32 (float64 stays float64)."""
    b, h, queries, _d = q_BHSD.shape
    groups, keys = h // k_BGTD.shape[1], k_BGTD.shape[2]
    working = torch.promote_types(q_BHSD.dtype, torch.float32)
    k_BHDT = k_BGTD.to(working).repeat_interleave(groups, 1).transpose(-1, -2)
    v_BHTE = v_BGTE.to(working).repeat_interleave(groups, 1)
    masks = Masks((b, h, queries, keys), mask, pad_BT, aux or (), causal, window, predicate, bias)
    out_BHSE = q_BHSD.new_empty((b, h, queries, v_BGTE.shape[-1]))
    for start in range(0, queries, BLOCK):
        rows = range(start, min(start + BLOCK, queries))
        scores_BHRT = q_BHSD[:, :, rows.start : rows.stop].to(working) @ k_BHDT * scale
        if softcap:
            scores_BHRT = softcap * torch.tanh(scores_BHRT / softcap)
        added, visible = masks.of(rows, q_BHSD.device)
        if added is not None:
            scores_BHRT = scores_BHRT + added
        weights_BHRT = masked_softmax(scores_BHRT, visible, sinks_H)
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

    def of(self, rows: range, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
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
            part = self.mask
            if part.ndim >= 2 and part.shape[-2] != 1:
                part = part[..., rows.start : rows.stop, :]
            (visible if part.dtype == torch.bool else added).append(part)
        if self.predicate:
            visible.append(language.evaluate(self.predicate, self.sizes, self.aux, rows, device))
        if self.bias:
            added.append(language.evaluate(self.bias, self.sizes, self.aux, rows, device))
        return _combined(added, torch.add), _combined(visible, torch.logical_and)


def _combined(parts: list[Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    return functools.reduce(combine, parts) if parts else None


def fake(q_BHSD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, *_: object, **__: object) -> Tensor:
    """Result `[B, H, S, E]` in the query's dtype."""
    b, h, s, _d = q_BHSD.shape
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
