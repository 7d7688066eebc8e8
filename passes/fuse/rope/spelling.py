"""The spellings of a rotation: which x is turned by which tables, and how its columns pair up.

    cat([-x[R/2:], x[:R/2]]) * sin + x * cos                         rotate-half
    stack([-x[1::2], x[::2]], -1).flatten(-2) * sin + x * cos        interleaved
    cat([a * cos - b * sin, b * cos + a * sin], -1)                  halves a, b, or even and odd
    stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)    even a, odd b
    view_as_real(view_as_complex(x as pairs) * freqs).flatten(-2)    complex

The last three read tables of half width: an angle a pair. The minus belongs to the part that comes
first; look-alikes with another sign, none, or with the halves rolled are candidates and refused.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.ir.graph import argument, dtype_of, is_call, shape_of
from graphopt.passes.base import Reject, not_floats
from graphopt.passes.fuse.walk import columns, is_last_axis, only_user, other_operand

aten = torch.ops.aten
_RESHAPES = (
    aten.flatten.using_ints,
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.unflatten.int,
)
_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_MEND = "spell it x * cos + cat([-second_half, first_half], -1) * sin"


@dataclass(frozen=True, slots=True)
class Turn:
    """`last` is x turned by the tables. For complex tables cos and sin are the same node.

    halves: when not None, x is not turned itself but the join of these two: DeepSeek's even and odd
    columns, which it leaves as halves.
    """

    last: fx.Node
    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    interleaved: bool
    half_tables: bool
    halves: tuple[fx.Node, fx.Node] | None = None


def is_rotation(node: fx.Node) -> bool:
    """Candidates, one a rotation."""
    if is_call(node, aten.view_as_complex.default):
        return True
    if is_call(node, aten.roll.default):
        return _rolls_halves(node)
    if not is_call(node, aten.cat.default, aten.stack.default):
        return False
    parts = argument(node, "tensors")
    if len(parts) != 2:
        return False
    if is_call(parts[0], aten.neg.default):
        return True
    if all(is_call(part, *_SUMS) for part in parts):
        terms = [term for part in parts for term in part.args]
        return sum(is_call(term, aten.mul.Tensor) for term in terms) >= 3
    return _is_signless(node, parts)


def _is_signless(node: fx.Node, parts: Sequence[fx.Node]) -> bool:
    """A join of the parts of one tensor, some of them changed, times a table, plus something."""
    found = [_part(part) or _part_below(part) for part in parts]
    by_sin = only_user(_joined(node) or node)
    if found[0] is None or found[1] is None or not is_call(by_sin, aten.mul.Tensor):
        return False
    return found[0][0] is found[1][0] and by_sin is not None and is_call(only_user(by_sin), *_SUMS)


def _part_below(node: fx.Node) -> tuple[fx.Node, range] | None:
    """The part that one op on one tensor was given."""
    is_changed = node.op == "call_function" and len(node.all_input_nodes) == 1
    return _part(node.all_input_nodes[0]) if is_changed else None


def read_turn(node: fx.Node) -> Turn | Reject:
    """The spelling anchored at a candidate."""
    if is_call(node, aten.view_as_complex.default):
        turn = _complex(node)
    elif is_call(node, aten.roll.default):
        return Reject("rotation-by-roll", "the halves are exchanged by a roll", node, _MEND)
    elif is_call(argument(node, "tensors")[0], aten.neg.default):
        turn = _with_rotated(node)
    elif not all(is_call(part, *_SUMS) for part in argument(node, "tensors")):
        text = "the part that comes first is not negated, or the other is"
        return Reject("rotation-sign", text, node, _MEND)
    else:
        turn = _with_halves(node)
    if isinstance(turn, Reject):
        return turn
    tables = (dtype_of(turn.cos), dtype_of(turn.sin))
    real = [torch.float32 if d == torch.complex64 else d for d in tables]
    wide = torch.promote_types(dtype_of(turn.x), torch.promote_types(*real))
    if wide != dtype_of(turn.last):
        return Reject("table-dtype", "the result has another dtype than x, cos and sin", turn.last)
    return not_floats("a rotary embedding", turn.x, turn.last) or turn


def _with_rotated(node: fx.Node) -> Turn | Reject:
    """x * cos + rotate(x) * sin, anchored on the join in rotate(x)."""
    negated, first = argument(node, "tensors")
    joined, stacked = _joined(node), is_call(node, aten.stack.default)
    pair = _pair(first, negated.args[0], stacked)
    if joined is None or pair is None or pair[1] is not stacked:
        return Reject("not-two-halves", "the parts are not the two halves of one tensor", node)
    x, interleaved = pair
    by_sin = only_user(joined)
    if by_sin is None or not is_call(by_sin, aten.mul.Tensor):
        return Reject("rotation-used-elsewhere", "the rotated half has other users", joined)
    last = only_user(by_sin)
    if last is None or not is_call(last, aten.add.Tensor) or last.kwargs:
        return Reject(
            "no-sum",
            "the sine term is not added to a cosine term",
            by_sin,
            "spell it x * cos + rotate(x) * sin",
        )
    by_cos = other_operand(last, by_sin)
    if by_cos is None or not is_call(by_cos, aten.mul.Tensor) or x not in by_cos.args:
        return Reject("no-cosine-term", "the other term is not x * cos", last)
    cos, sin = other_operand(by_cos, x), other_operand(by_sin, joined)
    if cos is None or sin is None:
        return Reject("no-table", "cos or sin is a number", last)
    return Turn(last, x, cos, sin, interleaved, half_tables=False)


def _with_halves(node: fx.Node) -> Turn | Reject:
    """join(a * cos - b * sin, b * cos + a * sin), anchored on the join."""
    difference, total = argument(node, "tensors")
    if not is_call(difference, aten.sub.Tensor) or not is_call(total, aten.add.Tensor):
        text = "the parts are not a difference and a sum, in this order"
        return Reject(
            "rotation-sign", text, node, "spell them a * cos - b * sin, b * cos + a * sin"
        )
    last, stacked = _joined(node), is_call(node, aten.stack.default)
    terms = [set(term.args) for term in total.args if is_call(term, aten.mul.Tensor)]
    is_plain = not difference.kwargs and not total.kwargs
    for a, cos in _both_orders(difference.args[0]):
        for b, sin in _both_orders(difference.args[1]):
            pair = _pair(a, b, stacked)
            if (
                pair is None
                or not is_plain
                or terms not in ([{b, cos}, {a, sin}], [{a, sin}, {b, cos}])
            ):
                continue
            x, interleaved = pair
            if last is None or (stacked and not interleaved):
                return Reject(
                    "pair-order",
                    "the turned halves are put back as even and odd columns",
                    node,
                    "cat halves, stack and flatten even and odd columns",
                )
            halves = (a, b) if interleaved and not stacked else None
            return Turn(last, x, cos, sin, stacked, half_tables=True, halves=halves)
    return Reject(
        "not-two-halves", "the terms are not a * cos - b * sin and b * cos + a * sin", node
    )


def _complex(node: fx.Node) -> Turn | Reject:
    """Pairs as complex numbers, times a complex table."""
    pairs = node.args[0]
    x = pairs.args[0] if is_call(pairs, *_RESHAPES) and isinstance(pairs, fx.Node) else None
    if not isinstance(x, fx.Node) or _sizes(pairs) != _paired_sizes(x):  # type: ignore[arg-type]
        return Reject("not-pairs", "the complex numbers are not the column pairs of x", node)
    product = only_user(node)
    table = other_operand(product, node) if is_call(product, aten.mul.Tensor) else None  # type: ignore[arg-type]
    if product is None or table is None or not table.meta["val"].is_complex():
        return Reject("no-table", "the complex numbers are not multiplied by a table", node)
    real = only_user(product)
    last = only_user(real) if is_call(real, aten.view_as_real.default) and real else None
    same = last is not None and is_call(last, *_RESHAPES) and _sizes(last) == _sizes(x)
    if last is None or not same:
        return Reject("not-pairs", "the pairs are not put back into columns", product)
    return Turn(last, x, table, table, interleaved=True, half_tables=True)


def _rolls_halves(node: fx.Node) -> bool:
    """x rolled by half of its columns."""
    shifts, axes = argument(node, "shifts"), argument(node, "dims")
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return len(shifts) == 1 and is_last_axis(x, axes) and 2 * abs(shifts[0]) == shape_of(x)[-1]


def _joined(node: fx.Node) -> fx.Node | None:
    """The node with the joined columns: of cat itself, of stack the flatten behind it."""
    if not is_last_axis(node, argument(node, "dim")):
        return None
    if is_call(node, aten.cat.default):
        return node
    flat = only_user(node)
    if flat is None or not is_call(flat, *_RESHAPES):
        return None
    *leading, count, two = shape_of(node)
    return flat if _sizes(flat) == [*map(str, leading), str(count * two)] else None


def _both_orders(product: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    left, right = product.args[:2] if is_call(product, aten.mul.Tensor) else (None, None)
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return []
    return [(left, right), (right, left)]


def _pair(first: fx.Node, second: fx.Node, stacked: bool) -> tuple[fx.Node, bool] | None:
    """(x, interleaved) when the two are the halves, or the even and odd columns, of all of x.

    Two columns are both; then the way they are joined decides.
    """
    one, two = _part(first), _part(second)
    if one is None or two is None or one[0] is not two[0]:
        return None
    x, width = one[0], int(shape_of(one[0])[-1])
    if width % 2 or width == 0:
        return None
    found, order = (list(one[1]), list(two[1])), list(range(width))
    halved = found == (order[: width // 2], order[width // 2 :])
    interleaved = found == (order[::2], order[1::2])
    if not halved and not interleaved:
        return None
    return x, stacked if halved and interleaved else interleaved


def _part(node: fx.Node) -> tuple[fx.Node, range] | None:
    """Columns of x; also one element of each pair of x reshaped to `[..., R/2, 2]`."""
    found = columns(node)
    if found is not None:
        return found
    source = node.args[0] if node.op == "call_function" and node.args else None
    if is_call(node, operator.getitem) and is_call(source, aten.unbind.int):
        pairs, axis, index = source.args[0], argument(source, "dim"), node.args[1]  # type: ignore[union-attr, arg-type]
    elif is_call(node, aten.select.int):
        pairs, axis, index = source, argument(node, "dim"), node.args[2]
    else:
        return None
    if not isinstance(pairs, fx.Node) or not is_call(pairs, *_RESHAPES):
        return None
    x = pairs.args[0]
    if not isinstance(x, fx.Node) or not isinstance(index, int):
        return None
    if not is_last_axis(pairs, axis) or _sizes(pairs) != _paired_sizes(x):
        return None
    return x, range(index % 2, int(shape_of(x)[-1]), 2)


def _sizes(node: fx.Node) -> list[str]:
    return [str(size) for size in shape_of(node)]


def _paired_sizes(x: fx.Node) -> list[str] | None:
    """Sizes of x with its columns in pairs; None when they have none."""
    width = shape_of(x)[-1]
    return [*_sizes(x)[:-1], str(width // 2), "2"] if isinstance(width, int) else None
