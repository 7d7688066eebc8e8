"""One attention, described choice by choice; see `mutations.py`.

The steps of `forward` follow the choices of `Attention` in order: operands, repeated heads, scale,
product, softcap, mask, softmax, probabilities, values, users of intermediates.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from mutations import Mutation, words
from torch import Tensor, nn

HEADS, WIDTH = 4, 8
SCALE = 1 / math.sqrt(WIDTH)
INFINITY = float("inf")
COMPARES = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "!=": operator.ne,
    "==": operator.eq,
}


@dataclass(frozen=True, slots=True)
class Attention:
    """Choices; the defaults are softmax(q @ k^T * scale) @ v without a mask."""

    operands: str = "plain"
    kv_heads: int = HEADS
    repeat: str = "none"
    scale: float = SCALE
    scale_place: str = "scores"
    product: str = "matmul"
    softcap: str = "none"
    mask: str = "none"
    compare: str = "<="
    shift: int = 0
    made: str = "arange"
    form: str = "fill"
    hidden: float = -INFINITY
    softmax: str = "softmax"
    axis: int = -1
    probabilities: str = "plain"
    second_user: str = "none"

    def build(self) -> nn.Module:
        """The module."""
        return AttentionProgram(self)


class AttentionProgram(nn.Module):
    """Attention over x[0], x[1], x[2] `[B, S, 32]`; returns `[B, H, S, 8]`."""

    def __init__(self, choices: Attention) -> None:
        super().__init__()
        self.choices = choices
        self.by_head = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)
        self.register_buffer("one_number", torch.tensor(choices.scale))

    def forward(self, x: Tensor, pad_BS: Tensor) -> Tensor:
        """See the class."""
        c = self.choices
        q, k, v = (x[i].unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for i in range(3))
        if c.kv_heads < HEADS:
            k, v = k[:, : c.kv_heads], v[:, : c.kv_heads]
        q, k, v = self.moved(q, k, v)
        k, v = self.repeated(k, is_key=True), self.repeated(v, is_key=False)
        if c.product == "sdpa":
            mask = None if c.mask == "none" else self.sdpa_mask(q, pad_BS)
            return self.by_sdpa(q, k, v, mask)
        q, k = self.scaled_operands(q, k)
        scores = self.scores(q, k)
        if c.product == "bmm":
            v = v.reshape(-1, v.shape[2], WIDTH)
        if c.softcap != "after-mask":
            scores = self.capped(scores)
        scores = self.scaled_scores(scores, x)
        if c.mask != "none":
            scores = self.masked(scores, pad_BS)
        if c.scale_place == "after-mask":
            scores = scores * c.scale
        if c.softcap == "after-mask":
            scores = torch.tanh(scores / 30.0) * 30.0
        weights = self.changed(self.normalised(scores), pad_BS)
        out = self.values(weights, v)
        if c.second_user == "probabilities":
            out = out + weights.sum(-1, keepdim=True)
        if c.second_user == "probabilities-peak":
            out = out * weights.amax(-1, keepdim=True)
        if c.second_user == "scores":
            out = out + scores.mean(-1, keepdim=True).nan_to_num(0.0, 0.0, 0.0)
        if c.second_user == "q":
            out = out + q.reshape(out.shape)
        if c.second_user == "v":
            out = out + v.reshape(out.shape)
        return out

    def moved(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The operands `[B, H, S, D]`, moved about."""
        how = self.choices.operands
        if how == "q-flipped":
            q = q.flip(2)
        elif how == "k-flipped":
            k = k.flip(2)
        elif how == "v-flipped":
            v = v.flip(2)
        elif how == "k-rolled":
            k = torch.roll(k, 1, 2)
        elif how == "v-rolled":
            v = torch.roll(v, 1, 2)
        elif how == "k-heads-rolled":
            k = torch.roll(k, 1, 1)
        elif how == "v-heads-flipped":
            v = v.flip(1)
        elif how == "v-batch-flipped":
            v = v.flip(0)
        elif how == "k-width-flipped":
            k = k.flip(3)
        elif how == "k-shifted":
            k = F.pad(k, (0, 0, 1, 0))[:, :, :-1]
        elif how == "v-shifted":
            v = F.pad(v, (0, 0, 1, 0))[:, :, :-1]
        elif how == "k-negative":
            k = -k
        elif how == "v-scaled":
            v = v * 2.0
        elif how == "contiguous":
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        elif how == "strided":
            k = k.transpose(2, 3).contiguous().transpose(2, 3)
        elif how == "k-is-q":
            k = q
        elif how == "v-is-k":
            v = k
        elif how == "v-rounded":
            v = v.to(torch.bfloat16).float()
        elif how == "k-rounded":
            k = k.to(torch.float16).float()
        elif how == "q-double":
            q = q.double().float()
        elif how == "in-place":
            q = q.clone().mul_(1.5)
        return q, k, v

    def repeated(self, y: Tensor, *, is_key: bool) -> Tensor:
        """Heads of keys or values repeated for those of the queries."""
        how, count = self.choices.repeat, HEADS // self.choices.kv_heads
        if how == "k-tiled":
            how = "tiled" if is_key else "interleaved"
        elif how == "v-tiled":
            how = "interleaved" if is_key else "tiled"
        if how == "interleaved":
            return y.repeat_interleave(count, 1)
        if how == "tiled":
            return y.repeat(1, count, 1, 1)
        if how == "joined":
            return torch.cat([y] * count, 1)
        if how == "expanded":
            return y[:, :, None].expand(-1, -1, count, -1, -1).flatten(1, 2)
        if how == "expanded-tiled":
            return y[:, None].expand(-1, count, -1, -1, -1).flatten(1, 2)
        if how == "expanded-first":
            return y[:, :1].expand(-1, HEADS, -1, -1)
        return y

    def scaled_operands(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Scales before the product."""
        c = self.choices
        if c.scale_place == "q":
            q = q * c.scale
        elif c.scale_place == "k":
            k = k * c.scale
        elif c.scale_place == "both":
            q, k = q * math.sqrt(c.scale), k * math.sqrt(c.scale)
        elif c.scale_place == "q-by-head":
            q = q * self.by_head
        elif c.scale_place == "k-added":
            k = k + c.scale
        return q, k

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """q @ k^T."""
        how = self.choices.product
        if how == "einsum":
            return torch.einsum("bhid,bhjd->bhij", q, k)
        if how == "einsum-transposed":
            return torch.einsum("bhid,bhjd->bhji", q, k)
        if how == "bmm":
            q, k = (y.reshape(-1, y.shape[2], WIDTH) for y in (q, k))
            return torch.bmm(q, k.transpose(1, 2))
        if how == "k-first":
            return k @ q.transpose(-1, -2)
        if how == "k-first-transposed":
            return (k @ q.transpose(-1, -2)).transpose(-1, -2)
        return q @ k.transpose(-1, -2)

    def scaled_scores(self, scores: Tensor, x: Tensor) -> Tensor:
        """Scales after the product."""
        c = self.choices
        if c.scale_place == "scores":
            return scores * c.scale
        if c.scale_place == "divided":
            return scores / (1 / c.scale)
        if c.scale_place == "in-place":
            return scores.mul_(c.scale)
        if c.scale_place == "tensor":
            return scores * self.one_number
        if c.scale_place == "by-head":
            return scores * self.by_head
        if c.scale_place == "by-data":
            return scores * x.mean()
        if c.scale_place == "by-row":
            return scores * x[0].mean(-1)[:, None, :, None]
        if c.scale_place == "by-key":
            return scores * x[0].mean(-1)[:, None, None, :]
        if c.scale_place == "by-length":
            return scores / scores.shape[-1]
        if c.scale_place == "added":
            return scores + c.scale
        if c.scale_place == "alpha":
            return torch.add(scores * c.scale, scores, alpha=2)
        if c.scale_place == "floored":
            return torch.div(scores, 1 / c.scale, rounding_mode="floor")
        if c.scale_place == "clamped":
            return (scores * c.scale).clamp(max=0.5)
        if c.scale_place == "squared":
            return (scores * c.scale).square()
        return scores

    def capped(self, scores: Tensor) -> Tensor:
        """A soft limit."""
        how = self.choices.softcap
        if how == "capped":
            return torch.tanh(scores / 3.0) * 3.0
        if how == "two-limits":
            return torch.tanh(scores / 3.0) * 2.0
        if how == "sine":
            return torch.sin(scores / 3.0) * 3.0
        if how == "sigmoid":
            return torch.sigmoid(scores / 3.0) * 3.0
        return scores

    def visible(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Which key a query sees, `[S, S]` booleans."""
        c = self.choices
        i, j = rows + c.shift, columns
        if c.mask == "window":
            return (j <= i) & (j > i - 3)
        if c.mask == "window-one-side":
            return j > i - 3
        if c.mask == "two-sided":
            return (i - j).abs() < 3
        if c.mask == "chunked":
            return (j <= i) & (j // 4 == i // 4)
        if c.mask == "chunked-truncated":
            first = torch.div(j - 2, 4, rounding_mode="trunc")
            return (j <= i) & (first == torch.div(i - 2, 4, rounding_mode="trunc"))
        if c.mask == "chunked-divided":
            return (j <= i) & (j / 4 == i / 4)
        if c.mask == "chunked-remainder":
            return (j <= i) & (j % 4 == i % 4)
        if c.mask == "prefix":
            return (j <= i) | (j < 2)
        if c.mask == "all":
            return j >= i - i
        return COMPARES[c.compare](j, i)

    def seen(self, s: int, pad_BS: Tensor) -> Tensor:
        """The mask, broadcastable to the scores."""
        c = self.choices
        if c.mask == "padded":
            return pad_BS[:, None, None, :].bool()
        if c.mask == "padded-rows":
            return pad_BS[:, None, :, None].bool()
        if c.mask == "padded-inverted":
            return ~pad_BS[:, None, None, :].bool()
        if c.mask == "padded-batch-flipped":
            return pad_BS.flip(0)[:, None, None, :].bool()
        if c.mask == "padded-rolled":
            return torch.roll(pad_BS, 1, 1)[:, None, None, :].bool()
        if c.mask == "padded-or-causal":
            return pad_BS[:, None, None, :].bool() | self.triangle(s)
        if c.mask == "causal-and-padded":
            return pad_BS[:, None, None, :].bool() & self.triangle(s)
        if c.mask == "by-head":
            return self.triangle(s) | (torch.arange(HEADS)[:, None, None] > 1)
        return self.triangle(s)

    def triangle(self, s: int) -> Tensor:
        """`[1, 1, S, S]` from positions, or from ones above or below a diagonal."""
        c = self.choices
        if c.made == "tril":
            return torch.ones(s, s, dtype=torch.bool).tril(c.shift)[None, None]
        if c.made == "triu":
            return ~torch.ones(s, s, dtype=torch.bool).triu(1 + c.shift)[None, None]
        if c.made == "triu-kept":
            return torch.ones(s, s, dtype=torch.bool).triu(c.shift)[None, None]
        if c.made == "tril-float":
            return torch.tril(torch.ones(s, s), c.shift)[None, None] == 1
        if c.made == "cumulative":
            rows = torch.ones(s, dtype=torch.int64).cumsum(0) - 1
            return self.visible(rows[:, None], rows[None, :])[None, None]
        if c.made == "flipped":
            rows = torch.arange(s).flip(0)
            return self.visible(rows[:, None], rows[None, :])[None, None]
        if c.made == "rows-flipped":
            rows = torch.arange(s)
            return self.visible(rows.flip(0)[:, None], rows[None, :])[None, None]
        if c.made == "transposed":
            rows = torch.arange(s)
            return self.visible(rows[:, None], rows[None, :])[None, None].transpose(-1, -2)
        if c.made == "doubled":
            rows = torch.arange(s)
            return self.visible(2 * rows[:, None], rows[None, :])[None, None]
        if c.made == "alpha":
            rows = torch.arange(s)
            past = torch.rsub(rows[None, :], rows[:, None], alpha=2)
            return (past >= 0)[None, None]
        rows = torch.arange(s)
        return self.visible(rows[:, None], rows[None, :])[None, None]

    def masked(self, scores: Tensor, pad_BS: Tensor) -> Tensor:
        """The mask applied."""
        c = self.choices
        shape = scores.shape
        if c.product == "bmm":
            scores = scores.view(-1, HEADS, shape[-1], shape[-1])
        seen, low = self.seen(shape[-1], pad_BS), max(c.hidden, -1e9)
        if c.mask == "biased":
            rows = torch.arange(shape[-1])
            scores = scores - (rows[:, None] - rows[None, :]).abs() * 0.1
        elif c.form == "where":
            scores = torch.where(seen, scores, c.hidden)
        elif c.form == "where-swapped":
            scores = torch.where(seen, c.hidden, scores)
        elif c.form == "fill-seen":
            scores = scores.masked_fill(seen, c.hidden)
        elif c.form == "fill-in-place":
            scores = scores.masked_fill_(~seen, c.hidden)
        elif c.form == "added":
            scores = scores + torch.where(seen, 0.0, c.hidden)
        elif c.form == "added-soft":
            scores = scores + torch.where(seen, 0.5, c.hidden)
        elif c.form == "added-alpha":
            scores = torch.add(scores, torch.where(seen, 0.0, low), alpha=2)
        elif c.form == "subtracted":
            scores = scores - torch.where(seen, 0.0, low)
        elif c.form == "times":
            scores = scores + (1.0 - seen.float()) * low
        elif c.form == "times-one":
            scores = scores + (1.0 - seen.float())
        elif c.form == "times-seen":
            scores = scores + seen.float() * low
        elif c.form == "multiplied":
            scores = scores * seen.float()
        elif c.form == "twice":
            scores = scores.masked_fill(~seen, c.hidden).masked_fill(~seen, 0.0)
        elif c.form == "logarithm":
            scores = scores + seen.float().log()
        else:
            scores = scores.masked_fill(~seen, c.hidden)
        return scores.view(shape) if c.product == "bmm" else scores

    def normalised(self, scores: Tensor) -> Tensor:
        """softmax, or something like it."""
        c, axis = self.choices, self.choices.axis
        if c.softmax == "float64":
            return F.softmax(scores, axis, dtype=torch.float64).float()
        if c.softmax == "bfloat16":
            return F.softmax(scores.to(torch.bfloat16), axis).float()
        if c.softmax == "scores-rounded":
            return F.softmax(scores.to(torch.bfloat16).float(), axis)
        if c.softmax == "shifted":
            return torch.softmax(scores - scores.amax(axis, keepdim=True), axis)
        if c.softmax == "shifted-other-axis":
            return torch.softmax(scores - scores.amax(-2, keepdim=True), axis)
        if c.softmax == "negative":
            return torch.softmax(-scores, axis)
        if c.softmax == "hot":
            return torch.softmax(scores / 2.0, axis)
        if c.softmax == "logarithmic":
            return torch.log_softmax(scores, axis).exp()
        if c.softmax == "log-softmax":
            return torch.log_softmax(scores, axis).clamp(min=-50.0)
        if c.softmax == "twice":
            return torch.softmax(torch.softmax(scores, axis), axis)
        if c.softmax == "sigmoid":
            return torch.sigmoid(scores)
        if c.softmax == "exp":
            powers = scores.exp()
            return powers / powers.sum(axis, keepdim=True)
        if c.softmax == "exp-shifted":
            powers = torch.exp(scores - scores.amax(axis, keepdim=True))
            return powers / powers.sum(axis, keepdim=True)
        if c.softmax == "exp-plus-one":
            powers = scores.exp()
            return powers / (1.0 + powers.sum(axis, keepdim=True))
        if c.softmax == "exp-other-sum":
            powers = scores.exp()
            return powers / powers.sum(-2, keepdim=True)
        if c.softmax == "exp-reciprocal":
            powers = scores.exp()
            return powers * powers.sum(axis, keepdim=True).reciprocal()
        if c.softmax == "exp2":
            powers = torch.exp2(scores * math.log2(math.e))
            return powers / powers.sum(axis, keepdim=True)
        if c.softmax == "exp2-unscaled":
            powers = torch.exp2(scores)
            return powers / powers.sum(axis, keepdim=True)
        if c.softmax == "logsumexp":
            return torch.exp(scores - torch.logsumexp(scores, axis, keepdim=True))
        return scores.softmax(axis)

    def changed(self, weights: Tensor, pad_BS: Tensor) -> Tensor:
        """The probabilities, changed before they meet the values."""
        how = self.choices.probabilities
        if how == "dropout-off":
            return F.dropout(weights, 0.1, training=False)
        if how == "dropout-on":
            return F.dropout(weights, 0.1, training=True)
        if how == "scaled":
            return weights * 0.5
        if how == "rounded":
            return weights.to(torch.bfloat16).float()
        if how == "transposed":
            return weights.transpose(-1, -2)
        if how == "flipped":
            return weights.flip(-1)
        if how == "renormalised":
            return weights / weights.sum(-1, keepdim=True)
        if how == "masked-after":
            return weights * pad_BS[:, None, None, :]
        if how == "diagonal-added":
            return weights + torch.eye(weights.shape[-1])
        if how == "in-place":
            return weights.mul_(2.0)
        if how == "heads-mixed":
            return weights.flip(-3)
        return weights

    def values(self, weights: Tensor, v: Tensor) -> Tensor:
        """weights @ v, `[B, H, S, D]`."""
        if self.choices.product == "einsum":
            return torch.einsum("bhij,bhjd->bhid", weights, v)
        if self.choices.product == "bmm":
            return torch.bmm(weights, v).view(-1, HEADS, v.shape[1], WIDTH)
        return weights @ v

    def sdpa_mask(self, q: Tensor, pad_BS: Tensor) -> Tensor:
        """A boolean mask, or an additive one."""
        c = self.choices
        seen = self.seen(q.shape[2], pad_BS)
        if c.form in ("added", "added-soft"):
            return torch.where(seen, 0.5 if c.form == "added-soft" else 0.0, c.hidden)
        return ~seen if c.form == "fill-seen" else seen

    def by_sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """torch's own attention."""
        c = self.choices
        attend = F.scaled_dot_product_attention
        if c.probabilities == "dropout-on":
            return attend(q, k, v, mask, dropout_p=0.1, scale=c.scale)
        if c.scale_place == "divided":
            return attend(q, k, v, mask)
        out = attend(q, k, v, mask, scale=c.scale)
        return out + v if c.second_user == "v" else out


PLAIN = Attention()
CAUSAL = replace(PLAIN, mask="causal")
PADDED = replace(PLAIN, mask="padded", form="times", hidden=-1e9)
SDPA = replace(PLAIN, product="sdpa")
CAUSAL_SDPA = replace(SDPA, mask="causal")
BASES = {
    "matmul": PLAIN,
    "causal": CAUSAL,
    "causal by addition": replace(CAUSAL, form="added", hidden=-1e9),
    "einsum with a window": replace(PLAIN, product="einsum", mask="window"),
    "grouped heads": replace(CAUSAL, kv_heads=2, repeat="interleaved"),
    "padded": PADDED,
    "bmm": replace(PLAIN, product="bmm", scale_place="q"),
    "sdpa": SDPA,
    "sdpa, causal": CAUSAL_SDPA,
}


def by_hand(c: Attention) -> bool:
    """Not torch's own attention."""
    return c.product != "sdpa"


def four_axes(c: Attention) -> bool:
    """By hand, heads apart."""
    return c.product not in ("sdpa", "bmm")


def plain(c: Attention) -> bool:
    """By hand without spelling extras, with a mask or without."""
    return c in (PLAIN, CAUSAL)


def triangular(c: Attention) -> bool:
    """A mask of positions."""
    return c.mask == "causal"


OPERANDS = words(
    """
    q-flipped k-flipped v-flipped k-rolled v-rolled k-heads-rolled v-heads-flipped v-batch-flipped
    k-width-flipped k-shifted v-shifted k-negative v-scaled contiguous
    strided k-is-q v-is-k v-rounded k-rounded q-double in-place
    """
)
SOFTMAXES = words(
    """
    float64 bfloat16 scores-rounded shifted shifted-other-axis negative hot logarithmic
    log-softmax twice sigmoid exp exp-shifted exp-plus-one exp-other-sum exp-reciprocal exp2
    exp2-unscaled logsumexp
    """
)
PROBABILITIES = words(
    """
    dropout-off scaled rounded transposed flipped renormalised
    diagonal-added in-place heads-mixed masked-after
    """
)
MADE = words(
    """
    tril triu triu-kept tril-float cumulative flipped rows-flipped transposed doubled alpha
    """
)
MASKS = words(
    """
    window window-one-side two-sided chunked chunked-truncated chunked-divided chunked-remainder
    prefix all by-head biased causal-and-padded padded-or-causal
    """
)
HIDDEN = (-INFINITY, -1e9, -3e38, -1e4, -100.0, -1.0, 0.0, 1e9)
FORMS = words(
    """
    where where-swapped fill-seen fill-in-place added added-soft added-alpha subtracted times
    times-one times-seen multiplied twice logarithm
    """
)
PLACES = words(
    """
    divided q k both q-by-head k-added in-place tensor by-head by-data by-row by-key by-length
    added alpha floored clamped squared none
    """
)


MUTATIONS = (
    Mutation("axis", (-2, 1, 0), four_axes),
    Mutation("axis", (-2, 0), lambda c: c.product == "bmm"),
    Mutation("softmax", SOFTMAXES, plain),
    Mutation("softmax", ("exp",), by_hand),
    Mutation("operands", OPERANDS, lambda c: c == PLAIN),
    Mutation("operands", ("k-flipped", "v-rolled", "k-is-q", "v-rounded"), lambda c: c == SDPA),
    Mutation("probabilities", PROBABILITIES, plain),
    Mutation("probabilities", ("dropout-on",), lambda c: c in (CAUSAL, SDPA)),
    Mutation("probabilities", ("transposed",), by_hand),
    Mutation("second_user", ("probabilities",), four_axes),
    Mutation("second_user", ("probabilities-peak", "scores", "q", "v"), plain),
    Mutation("second_user", ("v",), lambda c: c == SDPA),
    Mutation("scale", (1.0, -1.0), lambda c: c in (CAUSAL, SDPA)),
    Mutation("scale", (1e-3,), lambda c: c == PLAIN),
    Mutation("scale_place", PLACES, lambda c: c == CAUSAL),
    Mutation("scale_place", ("after-mask",), lambda c: c.mask != "none" and by_hand(c)),
    Mutation("scale_place", ("by-row", "added"), four_axes),
    Mutation("product", ("einsum-transposed", "k-first", "k-first-transposed"), plain),
    Mutation("softcap", ("capped", "two-limits", "sine", "sigmoid", "after-mask"), plain),
    Mutation("compare", ("<", ">=", ">", "!=", "=="), lambda c: c in (CAUSAL, CAUSAL_SDPA)),
    Mutation("shift", (1, -1), triangular),
    Mutation("shift", (1, -1, 2), lambda c: c.mask == "window"),
    Mutation("made", MADE, lambda c: c in (CAUSAL, CAUSAL_SDPA)),
    Mutation("form", FORMS, lambda c: c == CAUSAL),
    Mutation("form", ("where", "added-alpha", "times-seen", "multiplied"), lambda c: c == PADDED),
    Mutation("form", ("added-soft", "fill-seen"), lambda c: c.mask != "none"),
    Mutation("hidden", HIDDEN, lambda c: c in (CAUSAL, PADDED)),
    Mutation("hidden", (-100.0,), lambda c: c.mask != "none" and by_hand(c)),
    Mutation("mask", MASKS, lambda c: c in (CAUSAL, CAUSAL_SDPA)),
    Mutation(
        "mask",
        ("padded-rows", "padded-inverted", "padded-batch-flipped", "padded-rolled"),
        lambda c: c.mask == "padded",
    ),
    Mutation(
        "repeat",
        ("tiled", "joined", "expanded", "expanded-tiled", "expanded-first", "k-tiled", "v-tiled"),
        lambda c: c.kv_heads < HEADS,
    ),
)
