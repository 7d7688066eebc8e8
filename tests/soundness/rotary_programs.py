"""One rotary embedding, described choice by choice; see `mutations.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from mutations import Mutation, words
from torch import Tensor, nn

HEADS, WIDTH = 4, 8


@dataclass(frozen=True, slots=True)
class Rotary:
    """Choices; the defaults are x * cos + rotate_half(x) * sin."""

    spelling: str = "halves"
    operand: str = "plain"
    heads: str = "first"
    sign: str = "second"
    order: str = "plain"
    cut: int = WIDTH // 2
    angles: str = "plain"
    tables: str = "plain"
    terms: str = "plain"
    second_user: str = "none"

    def build(self) -> nn.Module:
        """The module."""
        return RotaryProgram(self)


class RotaryProgram(nn.Module):
    """x[0] `[B, S, 32]` as heads, turned by its position; returns `[B, H, S, 8]`."""

    def __init__(self, choices: Rotary) -> None:
        super().__init__()
        self.choices = choices
        self.width = WIDTH // 2 if choices.operand.startswith("partial") else WIDTH
        frequencies = 100.0 ** -(torch.arange(0, self.width, 2) / self.width)
        self.register_buffer("frequencies", frequencies)

    def forward(self, x: Tensor, pad_BS: Tensor) -> Tensor:
        """See the class."""
        c = self.choices
        y = x[0].unflatten(-1, (HEADS, WIDTH))
        if c.heads == "first":
            y = y.transpose(1, 2)
        angles_SR = self.angles(x)
        how = c.operand
        if how == "partial":
            return torch.cat([self.turned(y[..., :4], angles_SR), y[..., 4:]], -1)
        if how == "partial-swapped":
            return torch.cat([y[..., 4:], self.turned(y[..., :4], angles_SR)], -1)
        if how == "partial-last":
            return torch.cat([y[..., :4], self.turned(y[..., 4:], angles_SR)], -1)
        if how == "partial-shifted":
            return torch.cat([self.turned(y[..., :4], angles_SR), y[..., 3:7]], -1)
        if how == "partial-repeated":
            return torch.cat([self.turned(y[..., :4], angles_SR), y[..., :4]], -1)
        if how == "partial-strided":
            return torch.cat([self.turned(y[..., ::2], angles_SR), y[..., 1::2]], -1)
        if how == "partial-scaled":
            return torch.cat([self.turned(y[..., :4], angles_SR), y[..., 4:] * 2.0], -1)
        if how == "strided":
            y = y.transpose(2, 3).contiguous().transpose(2, 3)
        elif how == "doubled":
            y = y * 2.0
        elif how == "in-place":
            y = y.clone().mul_(2.0)
        elif how == "three-axes":
            return self.turned(x[0][..., :WIDTH], angles_SR)
        elif how == "folded":
            return self.turned(y.reshape(-1, y.shape[2], WIDTH), angles_SR)
        return self.turned(y, angles_SR)

    def angles(self, x: Tensor) -> Tensor:
        """Position times frequency `[S, R / 2]`."""
        how, s = self.choices.angles, x.shape[2]
        places = torch.arange(s).float()
        if how == "shifted":
            places = places + 1.0
        elif how == "negative":
            places = -places
        elif how == "flipped":
            places = places.flip(0)
        elif how == "halved":
            places = torch.div(torch.arange(s), 2, rounding_mode="floor").float()
        elif how == "constant":
            places = places * 0.0 + 3.0
        elif how == "squared":
            places = places * places
        angles_SR = places[:, None] * self.frequencies
        return angles_SR + 0.1 if how == "added" else angles_SR

    def shaped(self, table: Tensor) -> Tensor:
        """A table `[S, R]` broadcast to x."""
        c = self.choices
        if c.tables == "by-head":
            return table[None].expand(HEADS, -1, -1) * torch.arange(1.0, HEADS + 1)[:, None, None]
        if c.tables == "two-axes" and c.heads == "first":
            return table
        if c.tables == "double":
            table = table.double()
        return table[None, None] if c.heads == "first" else table[None, :, None]

    def turned(self, x: Tensor, angles_SR: Tensor) -> Tensor:
        """x rotated in the chosen spelling."""
        c = self.choices
        if c.spelling == "complex":
            return self.as_complex(x, angles_SR)
        cos, sin = angles_SR.cos(), angles_SR.sin()
        if c.tables == "swapped":
            cos, sin = sin, cos
        elif c.tables == "scaled":
            cos, sin = cos * 0.5, sin * 0.5
        elif c.tables == "cosine-scaled":
            cos = cos * 0.5
        elif c.tables == "sine-negative":
            sin = -sin
        elif c.tables == "rounded":
            cos, sin = (t.to(torch.bfloat16) for t in (cos, sin))
        elif c.tables == "sine-rounded":
            sin = sin.to(torch.bfloat16)
        elif c.tables == "tangent":
            sin = angles_SR.tan()
        if c.spelling in ("parts", "even-odd"):
            return self.of_parts(x, self.shaped(cos), self.shaped(sin))
        cos, sin = self.whole(cos), self.whole(sin)
        return self.summed(x, self.rotated(x), self.shaped(cos), self.shaped(sin))

    def whole(self, table: Tensor) -> Tensor:
        """`[S, R]` of `[S, R / 2]`: each angle for two columns."""
        c = self.choices
        interleaved = c.spelling == "interleaved"
        if c.tables == "other-layout":
            interleaved = not interleaved
        if c.tables == "second-half-negative":
            return torch.cat([table, -table], -1)
        if c.tables == "flipped":
            return torch.cat([table, table.flip(-1)], -1)
        if interleaved:
            return table.repeat_interleave(2, -1)
        return torch.cat([table, table], -1)

    def rotated(self, x: Tensor) -> Tensor:
        """rotate_half(x), or something like it."""
        c = self.choices
        if c.spelling == "interleaved":
            first, second = x[..., ::2], x[..., 1::2]
        elif c.order == "chunks":
            first, second = x.chunk(2, -1)
        elif c.order == "rolled":
            return torch.roll(x, x.shape[-1] // 2, -1) * self.signs(x.shape[-1])
        else:
            at = c.cut if x.shape[-1] == WIDTH else x.shape[-1] // 2
            first, second = x[..., :at], x[..., at:]
        if c.order == "swapped":
            first, second = second, first
        elif c.order == "both-first":
            second = first
        elif c.order == "flipped":
            first = first.flip(-1)
        if c.sign == "second":
            second = -second
        elif c.sign == "first":
            first = -first
        elif c.sign == "both":
            first, second = -first, -second
        elif c.sign == "doubled":
            second = -2.0 * second
        elif c.sign == "by-number":
            second = second * -1.0
        elif c.sign == "absolute":
            second = second.abs()
        elif c.sign == "subtracted":
            second = 0.0 - second
        if c.order == "kept":
            first, second = second, first
        if c.spelling == "interleaved" and c.order != "cat":
            return torch.stack([second, first], -1).flatten(-2)
        return torch.cat([second, first], -1)

    def signs(self, width: int) -> Tensor:
        """-1 for the first half of the columns."""
        return torch.where(torch.arange(width) < width // 2, -1.0, 1.0)

    def summed(self, x: Tensor, rotated: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x * cos + rotated * sin, or something like it."""
        how = self.choices.terms
        second = rotated * sin
        if how == "swapped":
            out = second + x * cos
        elif how == "subtracted":
            out = x * cos - second
        elif how == "alpha":
            out = torch.add(x * cos, second, alpha=2)
        elif how == "cosine-of-rotated":
            out = rotated * cos + second
        elif how == "one-cosine":
            out = x + second
        elif how == "third-term":
            out = x * cos + second + x
        elif how == "addcmul":
            out = torch.addcmul(x * cos, rotated, sin)
        elif how == "in-place":
            out = (x * cos).add_(second)
        elif how == "multiplied":
            out = x * cos * second
        elif how == "other-x":
            out = torch.roll(x, 1, 2) * cos + second
        else:
            out = x * cos + second
        if self.choices.second_user == "rotated":
            out = out + rotated
        elif self.choices.second_user == "sine-term":
            out = out + second
        elif self.choices.second_user == "x":
            out = out + x
        return out

    def of_parts(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[a cos - b sin, b cos + a sin], or something like it."""
        c = self.choices
        even = c.spelling == "even-odd"
        a, b = (x[..., ::2], x[..., 1::2]) if even else x.chunk(2, -1)
        if c.order == "swapped":
            a, b = b, a
        one, two = a * cos - b * sin, b * cos + a * sin
        if c.sign == "none":
            one = a * cos + b * sin
        elif c.sign == "first":
            one, two = a * cos + b * sin, b * cos - a * sin
        elif c.sign == "both":
            two = b * cos - a * sin
        elif c.sign == "doubled":
            one = torch.sub(a * cos, b * sin, alpha=2)
        elif c.sign == "absolute":
            one = b * sin - a * cos
        if c.terms == "cosine-of-rotated":
            two = a * cos + b * sin
        elif c.terms == "alpha":
            two = torch.add(b * cos, a * sin, alpha=2)
        elif c.terms == "one-cosine":
            two = b + a * sin
        elif c.terms == "swapped":
            two = a * sin + b * cos
        if c.second_user == "rotated":
            one = one + two.detach() * 0.5
        if c.order == "kept":
            one, two = two, one
        if (even and c.order != "cat") or c.order == "stacked":
            return torch.stack([one, two], -1).flatten(-2)
        return torch.cat([one, two], -1)

    def as_complex(self, x: Tensor, angles_SR: Tensor) -> Tensor:
        """Pairs as complex numbers times e^(i angle), or something like it."""
        c = self.choices
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        if c.order == "swapped":
            pairs = pairs.flip(-1)
        elif c.order == "kept":
            pairs = x.reshape(*x.shape[:-1], 2, -1).transpose(-1, -2).contiguous()
        size = (
            torch.full_like(angles_SR, 0.5) if c.tables == "scaled" else torch.ones_like(angles_SR)
        )
        table = torch.polar(size, angles_SR)
        if c.sign == "none":
            table = table.conj()
        elif c.sign == "both":
            table = -table
        table = self.shaped(table)
        numbers = torch.view_as_complex(pairs)
        if c.sign == "first":
            numbers = numbers.conj()
        if c.terms == "third-term":
            turned = torch.view_as_real(numbers * table + numbers)
        elif c.terms == "multiplied":
            turned = torch.view_as_real(numbers * table * table)
        elif c.terms == "subtracted":
            turned = torch.view_as_real(numbers / table)
        else:
            turned = torch.view_as_real(numbers * table)
        if c.order == "flipped":
            return turned.transpose(-1, -2).flatten(-2)
        out = turned.flatten(-2)
        return out + torch.view_as_real(numbers).flatten(-2) if c.second_user == "rotated" else out


HALVES = Rotary()
BASES = {
    "rotate half": HALVES,
    "rotate half, heads last": replace(HALVES, heads="last"),
    "rotate half, partial": replace(HALVES, operand="partial"),
    "interleaved": replace(HALVES, spelling="interleaved"),
    "halves": replace(HALVES, spelling="parts"),
    "even and odd": replace(HALVES, spelling="even-odd"),
    "complex": replace(HALVES, spelling="complex"),
}


def by_rotation(c: Rotary) -> bool:
    """x * cos + rotated * sin."""
    return c.spelling in ("halves", "interleaved")


def by_parts(c: Rotary) -> bool:
    """The parts of the result one by one."""
    return c.spelling in ("parts", "even-odd")


def is_complex(c: Rotary) -> bool:
    """As complex numbers."""
    return c.spelling == "complex"


SIGNS = words(
    """
    none first both doubled by-number absolute subtracted
    """
)
TERMS = words(
    """
    swapped subtracted alpha cosine-of-rotated one-cosine third-term addcmul in-place multiplied
    other-x
    """
)
TABLES = words(
    """
    swapped scaled cosine-scaled sine-negative rounded sine-rounded tangent other-layout
    second-half-negative flipped by-head two-axes double
    """
)

MUTATIONS = (
    Mutation("sign", SIGNS, lambda c: c == HALVES),
    Mutation("sign", ("none", "first", "both"), by_rotation),
    Mutation("sign", ("none", "first", "both", "doubled", "absolute"), by_parts),
    Mutation("sign", ("none", "first", "both"), is_complex),
    Mutation("order", ("swapped", "kept"), by_rotation),
    Mutation("order", ("both-first", "flipped"), lambda c: c == HALVES),
    Mutation("order", ("chunks", "rolled"), lambda c: c.spelling == "halves"),
    Mutation("order", ("cat",), lambda c: c.spelling in ("interleaved", "even-odd")),
    Mutation("order", ("swapped", "kept"), by_parts),
    Mutation("order", ("stacked",), lambda c: c.spelling == "parts"),
    Mutation("order", ("swapped", "flipped"), is_complex),
    Mutation("cut", (2, 3, 5, 6), lambda c: c == HALVES),
    Mutation("terms", TERMS, lambda c: c == HALVES),
    Mutation("terms", ("subtracted", "alpha", "one-cosine"), by_rotation),
    Mutation("terms", ("cosine-of-rotated", "alpha", "one-cosine", "swapped"), by_parts),
    Mutation("terms", ("third-term", "multiplied", "subtracted"), is_complex),
    Mutation("tables", TABLES, lambda c: c == HALVES),
    Mutation("tables", ("swapped", "other-layout"), by_rotation),
    Mutation("tables", ("swapped", "scaled", "sine-negative", "sine-rounded", "by-head"), by_parts),
    Mutation("tables", ("scaled",), is_complex),
    Mutation(
        "angles",
        ("shifted", "negative", "flipped", "halved", "constant", "squared", "added"),
        lambda c: c == HALVES,
    ),
    Mutation("angles", ("flipped", "added"), lambda c: not by_rotation(c)),
    Mutation(
        "operand",
        ("strided", "doubled", "in-place", "three-axes", "folded"),
        lambda c: c == HALVES,
    ),
    Mutation(
        "operand",
        ("partial-swapped", "partial-last", "partial-shifted", "partial-repeated"),
        lambda c: c.operand == "partial",
    ),
    Mutation("operand", ("partial-strided", "partial-scaled"), lambda c: c.operand == "partial"),
    Mutation("operand", ("partial",), lambda c: c.heads == "first" and not by_rotation(c)),
    Mutation("second_user", ("rotated", "sine-term", "x"), lambda c: c == HALVES),
    Mutation("second_user", ("rotated",), by_rotation),
    Mutation("second_user", ("rotated",), lambda c: is_complex(c) or by_parts(c)),
)
