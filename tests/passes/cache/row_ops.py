"""Ops on token rows `[B, S, 8]` as public decoders use them: those that keep rows apart, and the
same kinds of op along the token axis, with the op that must be named.

Each takes x, a table w `[64, 8]` of weights, and the ids `[B, S]`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Body = Callable[[Tensor, Tensor, Tensor], Tensor]


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


def _turn_by_complex_numbers(x: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(x.shape[1]).float(), 0.3 ** torch.arange(4))
    turns = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2)


def _experts(x: Tensor, w: Tensor) -> Tensor:
    chances = (x @ w[:4].t()).softmax(-1)
    best, which = chances.topk(2, -1)
    matrices = w.view(8, 8, 8)[which]
    return torch.einsum("bsk,bskde,bsd->bse", best, matrices, x)


def _routed(x: Tensor, w: Tensor) -> Tensor:
    chances = (x @ w[:4].t()).softmax(-1)
    best, which = chances.topk(2, -1)
    gates = torch.zeros_like(chances).scatter(-1, which, best)
    return torch.einsum("bse,ed->bsd", gates, w[:4])


def written(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., :4] = x[..., 4:]
    y[..., 7] = 0.5
    return y


def _tokens_first(x: Tensor) -> Tensor:
    """[S * B, 8]"""
    return x.transpose(0, 1).reshape(-1, 8)


def _back(folded: Tensor, x: Tensor) -> Tensor:
    return folded.view(x.shape[1], x.shape[0], 8).transpose(0, 1)


def _halves_swapped(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2, -1)[::-1], -1)


KEEPS: dict[str, Body] = {
    "normalize": lambda x, w, ids: F.normalize(x, dim=-1),
    "glu": lambda x, w, ids: F.glu(torch.cat([x, x.cos()], -1)),
    "roll": lambda x, w, ids: x.roll(1, -1),
    "flip": lambda x, w, ids: x.flip(-1),
    "cumsum": lambda x, w, ids: x.cumsum(-1),
    "cummax": lambda x, w, ids: x.cummax(-1)[0],
    "topk": lambda x, w, ids: x.topk(8, -1)[0],
    "sort": lambda x, w, ids: x.sort(-1)[0],
    "argsort_gather": lambda x, w, ids: x.gather(-1, x.argsort(-1)),
    "scatter": lambda x, w, ids: torch.zeros_like(x).scatter(-1, x.argsort(-1), x),
    "masked_fill": lambda x, w, ids: x.masked_fill(x > 1, 0.5),
    "masked_fill_tensor": lambda x, w, ids: x.masked_fill(x > 1, w[0, 0]),
    "nan_to_num": lambda x, w, ids: x.nan_to_num(),
    "logsumexp": lambda x, w, ids: x - x.logsumexp(-1, keepdim=True),
    "log_softmax": lambda x, w, ids: F.log_softmax(x, -1),
    "max_min": lambda x, w, ids: x - x.max(-1, keepdim=True)[0] + x.amin(-1, keepdim=True),
    "median": lambda x, w, ids: x - x.median(-1, keepdim=True)[0],
    "norm": lambda x, w, ids: x / (1 + x.norm(dim=-1, keepdim=True)),
    "var_mean": lambda x, w, ids: x - sum(torch.var_mean(x, -1, keepdim=True)),
    "layer_norm": lambda x, w, ids: F.layer_norm(x, (8,)),
    "rms_norm": lambda x, w, ids: F.rms_norm(x, (8,)),
    "group_norm": lambda x, w, ids: F.group_norm(x.flatten(0, 1), 2).view_as(x),
    "prelu": lambda x, w, ids: F.prelu(x, w[0, :1]),
    "hardswish": lambda x, w, ids: F.hardswish(x),
    "hardtanh": lambda x, w, ids: F.hardtanh(x),
    "softplus": lambda x, w, ids: F.softplus(x),
    "logsigmoid": lambda x, w, ids: F.logsigmoid(x),
    "softsign": lambda x, w, ids: F.softsign(x),
    "mish": lambda x, w, ids: F.mish(x),
    "tanhshrink": lambda x, w, ids: F.tanhshrink(x),
    "remainder": lambda x, w, ids: x.remainder(1.5) + x.floor() + x.round() + x.sign(),
    "floor_divide": lambda x, w, ids: x // 0.7,
    "where_number": lambda x, w, ids: torch.where(x > 0, x, 0.1),
    "where_table": lambda x, w, ids: torch.where(ids[..., None] > 5, x, w[:1]),
    "multiply": lambda x, w, ids: torch.multiply(x, 2.0) + torch.subtract(x, 1.0),
    "pow": lambda x, w, ids: torch.pow(2.0, x) + x.exp2() + x.clamp_min(0.1).rsqrt(),
    "bucketize": lambda x, w, ids: torch.bucketize(x, w[0].sort()[0]).float(),
    "isin": lambda x, w, ids: x * torch.isin(ids, torch.tensor([3, 4]))[..., None],
    "repeat_interleave": lambda x, w, ids: x[..., :4].repeat_interleave(2, -1),
    "tile": lambda x, w, ids: x[..., :4].tile(2),
    "expand_as": lambda x, w, ids: w[0].expand_as(x) * x,
    "movedim": lambda x, w, ids: x.movedim(-1, 0).swapaxes(0, 2).movedim((0, 1), (1, 0)),
    "chunk": lambda x, w, ids: torch.cat(x.chunk(2, -1)[::-1], -1),
    "tensor_split": lambda x, w, ids: torch.cat(x.tensor_split([3], -1)[::-1], -1),
    "unbind": lambda x, w, ids: torch.stack(x.unflatten(-1, (4, 2)).unbind(-1), -1).flatten(-2),
    "unfold": lambda x, w, ids: x.unfold(-1, 2, 2).flatten(-2),
    "pad": lambda x, w, ids: F.pad(x, (1, 2))[..., :8],
    "triangle": lambda x, w, ids: x.view(*x.shape[:2], 2, 4).tril().flatten(-2),
    "permutation": lambda x, w, ids: x[..., [7, 6, 5, 4, 3, 2, 1, 0]],
    "index_select": lambda x, w, ids: x.index_select(-1, torch.arange(7, -1, -1)),
    "index_add": lambda x, w, ids: x.index_add(-1, torch.arange(4), x[..., 4:]),
    "einsum": lambda x, w, ids: torch.einsum("bsd,ed->bse", x, w[:8]),
    "einsum_dots": lambda x, w, ids: torch.einsum("...d,de->...e", x, w[:8]),
    "einsum_no_arrow": lambda x, w, ids: torch.einsum("abi,ij", x, w[:8]),
    "einsum_heads": lambda x, w, ids: torch.einsum(
        "bhsd,hde->bshe", _heads(x), w[:4].view(2, 4, 4)
    ).flatten(2),
    "tensordot": lambda x, w, ids: torch.tensordot(x, w[:8], dims=1),
    "per_row_product": lambda x, w, ids: x * (x[:, :, None] @ x[..., None])[..., 0],
    "baddbmm": lambda x, w, ids: torch.baddbmm(x, x, w[:8].expand(x.shape[0], 8, 8)),
    "addmm": lambda x, w, ids: torch.addmm(w[0], x.flatten(0, 1), w[:8]).view_as(x),
    "bilinear": lambda x, w, ids: F.bilinear(x, x, w.view(8, 8, 8)),
    "conv_of_one": lambda x, w, ids: F.conv1d(x.mT, w[:8, :, None]).mT,
    "lookup": lambda x, w, ids: x + w[ids] + F.embedding(ids, w),
    "rotary_table": lambda x, w, ids: x * w[torch.arange(ids.shape[1])].cos(),
    "take": lambda x, w, ids: x * torch.take(w, ids)[..., None],
    "one_hot": lambda x, w, ids: F.one_hot(x.argmax(-1), 8).float(),
    "experts": lambda x, w, ids: _experts(x, w),
    "routed": lambda x, w, ids: _routed(x, w),
    "complex": lambda x, w, ids: _turn_by_complex_numbers(x),
    "double": lambda x, w, ids: (x.double() @ w[:8].double()).type_as(x),
    "half": lambda x, w, ids: x.half().cumsum(-1).to(x),
    "double_heads": lambda x, w, ids: x.double().view(*x.shape[:2], 2, 4).mT.flatten(2).float(),
    "complex_heads": lambda x, w, ids: (
        torch.complex(x, x.cos()).view(*x.shape[:2], 2, 4).mT.flatten(2).real
    ),
    "double_at_the_end": lambda x, w, ids: x.double() * 3,
    "integer_heads": lambda x, w, ids: (x * 9).long().view(*x.shape[:2], 2, 4).mT.flatten(2) * 0.1,
    "cosine": lambda x, w, ids: x * F.cosine_similarity(x, w[0], dim=-1)[..., None],
    "dropout_off": lambda x, w, ids: F.rrelu(F.alpha_dropout(x, 0.5, training=False)),
    "new_ones": lambda x, w, ids: x * x.new_ones(x.shape[0], x.shape[1], 1),
    "count": lambda x, w, ids: x * (x > 0).count_nonzero(-1)[..., None],
    "tokens_first": lambda x, w, ids: _back(F.linear(_tokens_first(x), w[:8]), x),
    "tokens_first_chunk": lambda x, w, ids: _back(_halves_swapped(_tokens_first(x)), x),
    "tokens_first_parts": lambda x, w, ids: _back(F.normalize(_tokens_first(x), dim=-1), x),
    "all_any": lambda x, w, ids: x * (x > 0).all(-1, keepdim=True) + (x < 0).any(-1, keepdim=True),
}

MIXES: dict[str, tuple[Body, str]] = {
    "normalize": (lambda x, w, ids: F.normalize(x, dim=1), "aten.linalg_vector_norm"),
    "roll": (lambda x, w, ids: x.roll(1, 1), "aten.roll"),
    "roll_of_all": (lambda x, w, ids: x.roll(1), "aten.roll"),
    "cummax": (lambda x, w, ids: x.cummax(1)[0], "aten.cummax"),
    "topk": (lambda x, w, ids: x + x.topk(1, 1)[0], "aten.topk"),
    "argsort": (lambda x, w, ids: x + x.argsort(1), "aten.argsort"),
    "gather": (lambda x, w, ids: x.gather(1, torch.zeros_like(x).long()), "aten.gather"),
    "scatter": (
        lambda x, w, ids: torch.zeros_like(x).scatter(1, torch.zeros_like(x).long(), x),
        "aten.scatter",
    ),
    "logsumexp": (lambda x, w, ids: x - x.logsumexp(1, keepdim=True), "aten.logsumexp"),
    "log_softmax": (lambda x, w, ids: F.log_softmax(x, 1), "aten.log_softmax"),
    "max": (lambda x, w, ids: x - x.max(1, keepdim=True)[0], "aten.max"),
    "max_of_all": (lambda x, w, ids: x - x.max(), "aten.max"),
    "mean_of_all": (lambda x, w, ids: x - x.mean(), "aten.mean"),
    "norm_of_all": (lambda x, w, ids: x / x.norm(), "aten.linalg_vector_norm"),
    "layer_norm": (lambda x, w, ids: F.layer_norm(x.mT, x.mT.shape[-1:]).mT, "aten.layer_norm"),
    "group_norm": (lambda x, w, ids: F.group_norm(x.mT, 2).mT, "aten.group_norm"),
    "instance_norm": (lambda x, w, ids: F.instance_norm(x.mT).mT, "aten.instance_norm"),
    "pad_shift": (lambda x, w, ids: F.pad(x, (0, 0, 1, -1)), "aten.pad"),
    "triangle": (lambda x, w, ids: x.tril(), "aten.tril"),
    "pooling": (lambda x, w, ids: F.avg_pool1d(x.mT, 3, 1, 1).mT, "aten.avg_pool1d"),
    "convolution": (
        lambda x, w, ids: F.conv1d(x.mT, w[:24].view(8, 8, 3), padding=1).mT,
        "aten.conv1d",
    ),
    "padded_convolution": (
        lambda x, w, ids: F.conv1d(x.mT, w[:8, :, None], padding=1).mT[:, 1:-1],
        "aten.conv1d",
    ),
    "einsum_scores": (
        lambda x, w, ids: torch.einsum("bsd,btd,bte->bse", x, x, x),
        "aten.einsum",
    ),
    "einsum_sum": (lambda x, w, ids: x + torch.einsum("bsd->bd", x)[:, None], "aten.einsum"),
    "einsum_batch": (lambda x, w, ids: x + torch.einsum("bsd->sd", x), "aten.einsum"),
    "einsum_outer": (
        lambda x, w, ids: (
            x
            + torch.einsum("i,j->ij", torch.arange(ids.shape[1]), torch.arange(ids.shape[1]))[:, :1]
        ),
        "aten.einsum",
    ),
    "tensordot": (
        lambda x, w, ids: x + torch.tensordot(x, x, dims=([0, 1], [0, 1]))[0],
        "aten.tensordot",
    ),
    "baddbmm": (lambda x, w, ids: torch.baddbmm(x, torch.bmm(x, x.mT), x), "aten.bmm"),
    "addbmm": (lambda x, w, ids: x + torch.addbmm(w[:8], x.mT, x)[0], "aten.addbmm"),
    "first_row_by_list": (lambda x, w, ids: x + x[:, [0]], "aten.index"),
    "rows_by_tokens": (lambda x, w, ids: x[:, ids[0]], "aten.select"),
    "index_select": (
        lambda x, w, ids: x + x.index_select(1, torch.tensor([0])),
        "aten.index_select",
    ),
    "row_written": (
        lambda x, w, ids: x.select_scatter(w[0].expand(x.shape[0], 8), 1, 0),
        "aten.select_scatter",
    ),
    "flatten_all": (lambda x, w, ids: x.flatten().cumsum(0).view_as(x), "aten."),
    "cosine": (lambda x, w, ids: x * F.cosine_similarity(x, x, dim=1)[:, None], "aten."),
    "distances": (lambda x, w, ids: x * torch.cdist(x, x).sum(-1, keepdim=True), "aten."),
    "random": (lambda x, w, ids: x + torch.rand_like(x), "aten.rand_like"),
    "dropout_on": (lambda x, w, ids: F.dropout(x, 0.5), "dropout"),
    "batch_items": (lambda x, w, ids: x + x.roll(1, 0), "aten.roll"),
    "last_row_for_all": (lambda x, w, ids: x + x[:, -1:], "aten.add"),
    "last_row_spread": (
        lambda x, w, ids: x[:, -1:].expand(-1, ids.shape[1], -1),
        "aten.expand",
    ),
    "first_row": (lambda x, w, ids: x + x[:, :1], "aten.slice"),
    "row_before_last": (lambda x, w, ids: x + x[:, -2:-1], "aten.slice"),
    "tokens_first": (lambda x, w, ids: _tokens_first(x).cos().view(x.shape), "aten.reshape"),
    "tokens_first_chunk": (
        lambda x, w, ids: _halves_swapped(_tokens_first(x)).view(x.shape),
        "aten.reshape",
    ),
    "tokens_first_parts": (
        lambda x, w, ids: F.normalize(_tokens_first(x), dim=-1).view(x.shape),
        "aten.reshape",
    ),
    "tokens_first_and_last": (
        lambda x, w, ids: _back(_tokens_first(x) + x.reshape(-1, 8), x),
        "aten.add",
    ),
    "length": (lambda x, w, ids: x / ids.shape[1], "aten.div"),
}
