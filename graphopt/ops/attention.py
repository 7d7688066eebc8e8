"""graphopt::attention, the one attention op every recogniser ends in.

    out_BHSE = softmax(softcap(q_BHSD @ k_BGTD^T * scale) + mask) @ v_BGTE

Head h reads key/value head `h // (H // G)`. Query i sits at key position `i + T - S`. A key is
visible when every stated condition holds: causal (key <= query), window (key > query - window),
`pad_BT` true, and `mask` (bool: true = visible; float: added). `sinks_H` is one more logit per head
that takes part in the softmax and has no value. A query that sees nothing gives zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ops.registry import Cost, define, nbytes

SCHEMA = (
    "attention(Tensor q_BHSD, Tensor k_BGTD, Tensor v_BGTE, Tensor? mask=None, "
    "Tensor? pad_BT=None, Tensor? sinks_H=None, *, float scale, bool causal=False, "
    "int window=0, float softcap=0.0) -> Tensor"
)


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
    *,
    scale: float,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Dense definition, scores in float32 (float64 stays float64)."""
    groups = q_BHSD.shape[1] // k_BGTD.shape[1]
    queries, keys = q_BHSD.shape[2], k_BGTD.shape[2]
    working = torch.promote_types(q_BHSD.dtype, torch.float32)
    k_BHTD = k_BGTD.to(working).repeat_interleave(groups, 1)
    v_BHTE = v_BGTE.to(working).repeat_interleave(groups, 1)
    scores_BHST = q_BHSD.to(working) @ k_BHTD.transpose(-1, -2) * scale
    if softcap:
        scores_BHST = softcap * torch.tanh(scores_BHST / softcap)
    visible: Tensor | None = None
    if causal or window:
        i_S1 = torch.arange(queries, device=q_BHSD.device)[:, None] + (keys - queries)
        j_1T = torch.arange(keys, device=q_BHSD.device)[None, :]
        visible = j_1T <= i_S1 if causal else torch.ones_like(j_1T <= i_S1)
        if window:
            visible = visible & (j_1T > i_S1 - window)
            if not causal:
                visible = visible & (j_1T < i_S1 + window)
    if pad_BT is not None:
        padding_B11T = pad_BT.bool()[:, None, None, :]
        visible = padding_B11T if visible is None else visible & padding_B11T
    if mask is not None:
        if mask.dtype == torch.bool:
            visible = mask if visible is None else visible & mask
        else:
            scores_BHST = scores_BHST + mask
    return (masked_softmax(scores_BHST, visible, sinks_H) @ v_BHTE).to(q_BHSD.dtype)


def fake(q_BHSD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, *_: Tensor | None, **__: object) -> Tensor:
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
