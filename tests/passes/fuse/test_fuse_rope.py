"""fuse_rope: spellings of rotary embeddings, look-alikes with their codes, values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuse_block import WIDTH, Fused, fuse
from torch import Tensor

from graphopt.ops import rope
from graphopt.testing import GoldenGraph

HALF = WIDTH // 2
FLOATS = [torch.float32, torch.bfloat16]
Rotate = Callable[[Tensor], Tensor]


def angles(x: Tensor, pairs: int = HALF, axis: int = 2) -> Tensor:
    """`[1, S, pairs]`, one angle a pair."""
    positions = torch.arange(x.shape[axis], dtype=torch.float32)
    return torch.outer(positions, 0.01 ** torch.linspace(0, 1, pairs))[None]


def tables(x: Tensor, width: int = WIDTH, axis: int = 2) -> tuple[Tensor, Tensor]:
    """`[1, S, width]` of cosines and sines, both halves, in x's dtype."""
    both = angles(x, width // 2, axis).repeat(1, 1, 2)
    return both.cos().to(x.dtype), both.sin().to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def llama(x: Tensor) -> Tensor:
    cos, sin = (t.unsqueeze(1) for t in tables(x))
    first, second = x[..., :HALF], x[..., HALF:]
    return x * cos + torch.cat([-second, first], -1) * sin


def commuted(x: Tensor) -> Tensor:
    cos, sin = (t.unsqueeze(1) for t in tables(x))
    return sin * rotate_half(x) + cos * x


def split_in_sizes(x: Tensor) -> Tensor:
    cos, sin = (t.unsqueeze(1) for t in tables(x))
    first, second = x.split([HALF, HALF], -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def tables_of_one_sequence(x: Tensor) -> Tensor:
    cos, sin = (t[0] for t in tables(x))
    return x * cos + rotate_half(x) * sin


def tables_with_a_batch_axis(x: Tensor) -> Tensor:
    cos, sin = tables(x)
    return x * cos + rotate_half(x) * sin


def sliced_after_unsqueeze(x: Tensor) -> Tensor:
    cos, sin = (t.unsqueeze(1).repeat(1, 1, 1, 2)[..., :WIDTH] for t in tables(x))
    return x * cos + rotate_half(x) * sin


def wide_tables(x: Tensor) -> Tensor:
    """Computed in float32, cast back."""
    cos, sin = (t.unsqueeze(1) for t in tables(x.float()))
    return (x.float() * cos + rotate_half(x.float()) * sin).to(x.dtype)


def cohere(x: Tensor) -> Tensor:
    """Interleaved, an angle a column."""
    both = angles(x).repeat_interleave(2, -1)
    cos, sin = both.cos().to(x.dtype).unsqueeze(1), both.sin().to(x.dtype).unsqueeze(1)
    return x * cos + rotate_pairs(x) * sin


def glm(x: Tensor) -> Tensor:
    """Interleaved; the first half of the table is repeated at the last moment."""
    cos, sin = (t.unsqueeze(1)[..., :HALF].repeat_interleave(2, -1) for t in tables(x))
    return x * cos + rotate_pairs(x) * sin


def gpt_oss(x: Tensor) -> Tensor:
    """Two halves, half tables."""
    cos, sin = (t[..., :HALF].unsqueeze(1) for t in tables(x))
    first, second = torch.chunk(x, 2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def gpt_oss_commuted(x: Tensor) -> Tensor:
    cos, sin = (t[..., :HALF].unsqueeze(1) for t in tables(x))
    first, second = torch.chunk(x, 2, -1)
    return torch.cat([cos * first - second * sin, sin * first + second * cos], -1)


def real_pairs(x: Tensor) -> Tensor:
    """Pairs as an axis of their own."""
    cos, sin = (t[..., :HALF].unsqueeze(1) for t in tables(x))
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(3)


def unbound_pairs(x: Tensor) -> Tensor:
    cos, sin = (t[..., :HALF].unsqueeze(1) for t in tables(x))
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def heads_last(rotation: Rotate) -> Rotate:
    """The same on `[B, S, H, D]`."""

    def swapped(x: Tensor) -> Tensor:
        return rotation(x.transpose(1, 2))

    return swapped


def llama_heads_last(x: Tensor) -> Tensor:
    y = x.transpose(1, 2)
    cos, sin = (t.unsqueeze(2) for t in tables(y, axis=1))
    return y * cos + rotate_half(y) * sin


def llama4(x: Tensor) -> Tensor:
    """Complex numbers, heads behind the sequence."""
    y = x.transpose(1, 2)
    phase = angles(y, axis=1)
    freqs = torch.polar(torch.ones_like(phase), phase)
    pairs = torch.view_as_complex(y.float().reshape(*y.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs[:, :, None, :]).flatten(3).type_as(x)


def scaled_complex(x: Tensor) -> Tensor:
    """A table that is more than a phase."""
    phase = angles(x)
    freqs = torch.polar(torch.ones_like(phase) * 0.7, phase)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs[:, None]).flatten(3).type_as(x)


def pairs_into_halves(x: Tensor) -> Tensor:
    """DeepSeek turns even and odd columns and leaves them as halves."""
    cos, sin = (t[..., :HALF].unsqueeze(1) for t in tables(x))
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1)


HALVES = [
    pairs_into_halves,
    llama,
    commuted,
    split_in_sizes,
    tables_of_one_sequence,
    tables_with_a_batch_axis,
    sliced_after_unsqueeze,
    wide_tables,
    gpt_oss,
    gpt_oss_commuted,
    llama_heads_last,
]
PAIRS = [cohere, glm, real_pairs, unbound_pairs, llama4, scaled_complex]


def fuse_rope(rotation: Rotate, dtype: torch.dtype = torch.float32) -> Fused:
    return fuse(lambda x, w: rotation(x) + w, "fuse_rope", dtype, rank=4)


def the_call(fused: Fused) -> Any:
    (call,) = fused.graph.calls(rope.SPEC.overload)
    return call


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rotation", [*HALVES, *PAIRS])
def test_rope_is_one_op(rotation: Rotate, dtype: torch.dtype) -> None:
    fused = fuse_rope(rotation, dtype)
    assert fused.codes == []
    assert the_call(fused).kwargs["interleaved"] is (rotation in PAIRS)
    left = {"aten.neg", "aten.stack", "aten.view_as_complex", "aten.sub.Tensor"}
    assert not left & set(fused.ops)


@pytest.mark.parametrize("rotation", [glm, gpt_oss, real_pairs, llama4])
def test_tables_stay_as_narrow_as_they_are(rotation: Rotate) -> None:
    call = the_call(fuse_rope(rotation))
    assert call.kwargs["half_tables"] is True
    assert call.args[1].meta["val"].shape[-1] == HALF


def test_no_complex_number_is_left() -> None:
    fused = fuse_rope(llama4)
    assert all(
        not n.meta["val"].is_complex()
        for n in fused.graph.nodes
        if n.op == "call_function" and isinstance(n.meta["val"], Tensor)
    )


def partial(rotated: int, split: bool, rotate: Rotate = rotate_half) -> Rotate:
    def rotation(x: Tensor) -> Tensor:
        cos, sin = (t.unsqueeze(1) for t in tables(x, rotated))
        if rotate is rotate_pairs:
            cos, sin = (t[..., : rotated // 2].repeat_interleave(2, -1) for t in (cos, sin))
        turned, kept = (
            x.split([rotated, x.shape[-1] - rotated], -1)
            if split
            else (x[..., :rotated], x[..., rotated:])
        )
        return torch.cat([turned * cos + rotate(turned) * sin, kept], -1)

    return rotation


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("rotate", [rotate_half, rotate_pairs])
@pytest.mark.parametrize("rotated", [2, 4, 12, WIDTH])
def test_partial_rotary(rotated: int, rotate: Rotate, split: bool, dtype: torch.dtype) -> None:
    """`rotated` == WIDTH passes no column through: phi3's slices of width 0."""
    fused = fuse_rope(partial(rotated, split, rotate), dtype)
    assert fused.codes == []
    assert the_call(fused).args[0].op == "placeholder"
    assert "aten.cat" not in fused.ops


@pytest.mark.parametrize(
    "join",
    [
        lambda y, x: torch.cat([x[..., 8:], y], -1),
        lambda y, x: torch.cat([y, x[..., :8]], -1),
        lambda y, x: torch.cat([y, x[..., 8:]], 1),
        lambda y, x: torch.cat([y, x[..., 8:], x[..., :1]], -1),
    ],
)
def test_other_joins_are_not_partial_rotary(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    def rotation(x: Tensor) -> Tensor:
        cos, sin = (t.unsqueeze(1) for t in tables(x, 8))
        turned = x[..., :8]
        return join(turned * cos + rotate_half(turned) * sin, x).sum(-1, keepdim=True)

    fused = fuse_rope(rotation)
    assert fused.ops["graphopt.rope"] == 1
    assert the_call(fused).args[0].op == "call_function"
    assert fused.ops["aten.cat"] == 1


def test_queries_and_keys_share_their_tables() -> None:
    def both(x: Tensor) -> Tensor:
        return gpt_oss(x) + gpt_oss(x.sin())

    fused = fuse_rope(both)
    assert fused.ops["graphopt.rope"] == 2
    first, second = fused.graph.calls(rope.SPEC.overload)
    assert first.args[0] is not second.args[0]
    assert first.args[1:] == second.args[1:]


def swapped_halves(x: Tensor) -> Tensor:
    cos, sin = (t.unsqueeze(1) for t in tables(x))
    return x * cos + torch.cat([-x[..., :HALF], x[..., HALF:]], -1) * sin


def odd_before_even(x: Tensor) -> Tensor:
    cos, sin = (t.unsqueeze(1) for t in tables(x))
    return x * cos + torch.stack([-x[..., ::2], x[..., 1::2]], -1).flatten(-2) * sin


def halves_into_pairs(x: Tensor) -> Tensor:
    cos, sin = (t[..., :HALF].unsqueeze(1) for t in tables(x))
    first, second = x.chunk(2, -1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)


def both_subtract(x: Tensor) -> Tensor:
    cos, sin = (t[..., :HALF].unsqueeze(1) for t in tables(x))
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * sin + first * cos], -1)


def used_twice(x: Tensor) -> Tensor:
    cos, sin = (t.unsqueeze(1) for t in tables(x))
    turned = rotate_half(x)
    return x * cos + turned * sin + turned


def subtracted(x: Tensor) -> Tensor:
    cos, sin = (t.unsqueeze(1) for t in tables(x))
    return x * cos - rotate_half(x) * sin


def another_x(x: Tensor) -> Tensor:
    cos, sin = (t.unsqueeze(1) for t in tables(x))
    return x.sin() * cos + rotate_half(x) * sin


def per_head_tables(x: Tensor) -> Tensor:
    cos, sin = (t.unsqueeze(1) * torch.arange(1, 3)[None, :, None, None] for t in tables(x))
    return x * cos + rotate_half(x) * sin


def one_position(x: Tensor) -> Tensor:
    cos, sin = (t.unsqueeze(1)[:, :, 1:2] for t in tables(x))
    return x * cos + rotate_half(x) * sin


def by_a_number(x: Tensor) -> Tensor:
    return x * 0.5 + rotate_half(x) * 0.5


def without_heads(x: Tensor) -> Tensor:
    y = x[:, 0]
    cos, sin = tables(y, axis=1)
    return (y * cos + rotate_half(y) * sin)[:, None]


def widened_by_its_tables(x: Tensor) -> Tensor:
    cos, sin = (t.unsqueeze(1).double() for t in tables(x))
    return (x * cos).float() + (rotate_half(x) * sin).float()


def complex_sum(x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs + 1).flatten(3)


def signless(x: Tensor) -> Tensor:
    cos, sin = (t.unsqueeze(1) for t in tables(x))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([second, first], -1) * sin


def sign_behind(x: Tensor) -> Tensor:
    cos, sin = (t.unsqueeze(1) for t in tables(x))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([second, -first], -1) * sin


def rolled(x: Tensor) -> Tensor:
    cos, sin = (t.unsqueeze(1) for t in tables(x))
    signs = torch.where(torch.arange(WIDTH) < HALF, -1.0, 1.0)
    return x * cos + torch.roll(x, HALF, -1) * signs * sin


@pytest.mark.parametrize(
    ("rotation", "code"),
    [
        (signless, "rotation-sign"),
        (sign_behind, "rotation-sign"),
        (rolled, "rotation-by-roll"),
        (swapped_halves, "not-two-halves"),
        (odd_before_even, "not-two-halves"),
        (both_subtract, "not-two-halves"),
        (halves_into_pairs, "pair-order"),
        (used_twice, "rotation-used-elsewhere"),
        (subtracted, "no-sum"),
        (another_x, "no-cosine-term"),
        (by_a_number, "no-table"),
        (per_head_tables, "table-shape"),
        (one_position, "table-shape"),
        (without_heads, "not-heads"),
        (widened_by_its_tables, "no-sum"),
        (complex_sum, "no-table"),
    ],
)
def test_rope_look_alikes(rotation: Rotate, code: str) -> None:
    fused = fuse_rope(rotation)
    assert fused.codes == [code]
    assert "graphopt.rope" not in fused.ops


@pytest.mark.parametrize("interleaved", [False, True])
def test_half_tables_of_the_op_are_the_wide_ones(interleaved: bool) -> None:
    x, half = torch.randn(2, 3, 5, WIDTH), torch.randn(1, 5, 4)
    wide = half.repeat_interleave(2, -1) if interleaved else torch.cat([half, half], -1)
    narrow = rope.reference(x, half, half, interleaved=interleaved, half_tables=True)
    assert torch.equal(narrow, rope.reference(x, wide, wide, interleaved=interleaved))


@pytest.mark.parametrize(
    ("name", "rotation"),
    [("rope", llama), ("rope_partial", partial(8, False, rotate_pairs)), ("rope_complex", llama4)],
)
def test_golden(golden_graph: GoldenGraph, name: str, rotation: Rotate) -> None:
    golden_graph(fuse_rope(rotation).graph, name)
