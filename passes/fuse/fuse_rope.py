"""fuse_rope: rotary embeddings become one op, whatever their spelling.

    before   y = x * cos + rotate(x) * sin                      rotate-half or interleaved
             y = cat([a * cos - b * sin, b * cos + a * sin])    a, b: the halves, or even and odd
             y = view_as_real(view_as_complex(x) * freqs)       pairs as complex numbers
    after    y = graphopt.rope(x, cos, sin, interleaved=..., half_tables=...)

One site a tensor: queries and keys are two. Where the result is joined with the columns behind the
rotated ones, the join is part of the site (partial rotary). Tables are shared by all heads; heads
may stand before or behind the sequence. The spellings are read in `rope_spelling.py`, the tables
here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphopt.ir.builder import GraphBuilder, replace
from graphopt.ir.graph import Graph, argument, axis_of, dtype_of, is_call, shape_of
from graphopt.ops import rope
from graphopt.passes.base import Pass, Reject, Stage, Tier
from graphopt.passes.fuse.rope.spelling import Turn, is_rotation, read_turn
from graphopt.passes.fuse.walk import columns, emit_once, is_last_axis, only_user
from graphopt.passes.registry import register

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Rotation:
    """`last` computes rope(x, cos, sin). heads_axis: of x, 1 or 2; half_tables: an angle a pair.

    cos and sin are one node when the table is complex. halves: what is turned instead of x.
    """

    last: fx.Node
    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    interleaved: bool
    half_tables: bool
    heads_axis: int
    halves: tuple[fx.Node, fx.Node] | None


@register
class FuseRope(Pass[Rotation]):
    """See the module docstring."""

    name: ClassVar[str] = "fuse_rope"
    stage: ClassVar[Stage] = "fuse"
    tier: ClassVar[Tier] = Tier("reassociating", 1e-6)

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        """Joins of a negated part and another part, of a difference and a sum; complex views; and
        what differs from these by a sign."""
        return [n for n in graph.nodes if is_rotation(n)]

    def check(self, graph: Graph, node: fx.Node) -> Rotation | Reject:
        """Read the spelling, then the tables, then what happens to the other columns."""
        turn = read_turn(node)
        if isinstance(turn, Reject):
            return turn
        if len(shape_of(turn.x)) != 4:
            return Reject(
                "not-heads",
                "expected [batch, heads, sequence, width]",
                node,
                "keep batch and heads as two axes",
            )
        cos, sin, halved = _narrowed(turn)
        axis = _heads_axis(cos, turn.x)
        if axis is None or axis != _heads_axis(sin, turn.x):
            return Reject(
                "table-shape",
                "cos and sin are not [batch or 1, sequence, width], the same for all heads",
                turn.last,
                "unsqueeze the head axis of cos and sin",
            )
        widths = {int(shape_of(table)[-1]) * (2 if halved else 1) for table in (cos, sin)}
        if widths != {int(shape_of(turn.x)[-1])}:
            return Reject("table-width", "cos and sin are not as wide as x", turn.last)
        last, x = _partial(turn)
        return Rotation(last, x, cos, sin, turn.interleaved, halved, axis, turn.halves)

    def rewrite(self, builder: GraphBuilder, bound: Rotation) -> None:
        """Emit the rotation where its last node stood."""
        last = bound.last
        tables = [_table(builder, last, bound, is_sin) for is_sin in (False, True)]
        swapped = bound.heads_axis == 2
        with builder.at(last):
            x = bound.x
            if bound.halves is not None:
                x = builder.emit(aten.cat.default, [list(bound.halves), -1], like=[x])
            if swapped:
                x = builder.emit(aten.transpose.int, [x, 1, 2], like=[x])
            new = builder.emit(
                rope.SPEC.overload,
                [x, *tables],
                {"interleaved": bound.interleaved, "half_tables": bound.half_tables},
                like=[last, bound.x],
            )
            new.meta["layer"] = last.meta["layer"]
            if swapped:
                new = builder.emit(aten.transpose.int, [new, 1, 2], like=[new])
        replace(builder.graph, last, new)


def _narrowed(turn: Turn) -> tuple[fx.Node, fx.Node, bool]:
    """(cos, sin, whether they hold an angle a pair); repeating each angle twice is undone."""
    if not turn.interleaved or turn.half_tables:
        return turn.cos, turn.sin, turn.half_tables
    halves = [_unrepeated(table) for table in (turn.cos, turn.sin)]
    if halves[0] is None or halves[1] is None:
        return turn.cos, turn.sin, False
    return halves[0], halves[1], True


def _unrepeated(table: fx.Node) -> fx.Node | None:
    if not is_call(table, aten.repeat_interleave.self_int) or argument(table, "repeats") != 2:
        return None
    return table.args[0] if is_last_axis(table, argument(table, "dim")) else None  # type: ignore[return-value]


def _heads_axis(table: fx.Node, x: fx.Node) -> int | None:
    """Where x `[B, H, S, D]` (1) or `[B, S, H, D]` (2) has its heads, as the table tells."""
    sizes = shape_of(table)
    if not 2 <= len(sizes) <= 4:
        return None
    padded = [1] * (4 - len(sizes)) + [str(size) for size in sizes]
    of_x = [str(size) for size in shape_of(x)]
    if str(padded[0]) not in ("1", of_x[0]):
        return None
    layouts = ((1, 2), (2, 1)) if len(sizes) > 2 else ((1, 2),)
    for heads, sequence in layouts:
        if str(padded[heads]) == "1" and str(padded[sequence]) == of_x[sequence]:
            return heads
    return None


def _table(builder: GraphBuilder, last: fx.Node, bound: Rotation, is_sin: bool) -> fx.Node:
    """`[B or 1, S, R or R/2]`, made next to the model's table and shared between sites."""
    table = bound.sin if is_sin else bound.cos
    rank = len(shape_of(table))
    # Counted from the end, the head axis of a table is that of x; short tables may have none.
    axis = bound.heads_axis + rank - 4
    if axis >= 0 and (rank == 4 or bound.heads_axis == 2):
        if is_call(table, aten.unsqueeze.default) and axis_of(argument(table, "dim"), rank) == axis:
            operand = argument(table, "self")
            assert isinstance(operand, fx.Node)
            table = operand
        else:
            table = emit_once(builder, last, aten.squeeze.dim, table, axis)
    if table.meta["val"].is_complex():
        table = _part_of_complex(builder, last, table, is_sin)
    if len(shape_of(table)) == 2:
        table = emit_once(builder, last, aten.unsqueeze.default, table, 0)
    return table


def _part_of_complex(builder: GraphBuilder, last: fx.Node, table: fx.Node, is_sin: bool) -> fx.Node:
    """Cosine or sine of a table e^(i angle)."""
    if is_call(table, aten.polar.default) and is_call(table.args[0], aten.ones_like.default):
        angle = table.args[1]
        assert isinstance(angle, fx.Node)
        return emit_once(builder, last, aten.sin.default if is_sin else aten.cos.default, angle)
    # view_as_real takes no lazily conjugated tensor.
    plain = emit_once(builder, last, aten.resolve_conj.default, table)
    pair = emit_once(builder, last, aten.view_as_real.default, plain)
    return emit_once(builder, last, aten.select.int, pair, len(shape_of(table)), int(is_sin))


def _partial(turn: Turn) -> tuple[fx.Node, fx.Node]:
    """(last, x), with the columns that only pass through when they are joined right behind."""
    join = only_user(turn.last)
    width = int(shape_of(turn.x)[-1])
    if join is None or not is_call(join, aten.cat.default) or turn.halves is not None:
        return turn.last, turn.x
    parts = argument(join, "tensors")
    if len(parts) != 2 or parts[0] is not turn.last:
        return turn.last, turn.x
    kept = columns(parts[1])
    if kept is None or not is_last_axis(join, argument(join, "dim")):
        return turn.last, turn.x
    x = kept[0]
    whole = columns(turn.x) or (turn.x, range(width))
    source = turn.x if x is turn.x else whole[0]
    begins = source is x and (x is turn.x or whole[1] == range(width))
    rest = range(width, int(shape_of(x)[-1]))
    fits = begins and list(kept[1]) == list(rest) and dtype_of(join) == dtype_of(turn.last)
    return (join, x) if fits else (turn.last, turn.x)
