"""What the proof of row independence tracks of a value, and the checks every op must pass.

Sizes are polynomials over two symbols, the batch size and the length of the sequence.

    row axis     enumerates token rows: its size is the sequence, or batch * sequence (folded: the
                 batch outermost, or the sequence, which the size does not tell)
    batch axis   the axis whose size holds the batch symbol: batch, batch * n (folded heads) or
                 batch * sequence; every op that works along it would mix requests
    table        a constant cut to the length of the sequence: row i reads entry start + i

A serving step is one batch item whose rows come from many requests, so an op is only right when it
treats rows and batch items one by one. `check_result` holds for every op, whatever its rule says:
the sequence appears on the row axis only, the batch on one axis only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graphopt.ir.graph import argument, op_name

aten = torch.ops.aten
Axis = int | None
Rule = Callable[["Rows", fx.Node], Axis]
"""Row axis of a call's result; raises RowsMixedError when the op mixes rows or batch items."""


class RowsMixedError(Exception):
    """Some op mixes token rows or batch items, or cannot be shown not to."""

    def __init__(self, code: str, text: str, node: fx.Node) -> None:
        super().__init__(text)
        self.code, self.text, self.node = code, text, node


def mixed(node: fx.Node, what: str) -> RowsMixedError:
    """The refusal for an op that is known to mix rows."""
    return RowsMixedError("rows-mixed", f"{op_name(node)} {what}", node)


def batch_mixed(node: fx.Node, what: str) -> RowsMixedError:
    """The refusal for an op that is known to mix batch items."""
    return RowsMixedError("batch-mixed", f"{op_name(node)} {what}", node)


def unknown(node: fx.Node, what: str) -> RowsMixedError:
    """The refusal for an op that no rule covers."""
    return RowsMixedError("rows-unknown", f"{op_name(node)} {what}", node)


@dataclass(frozen=True, slots=True)
class Table:
    """A constant of which row i reads entry `start + i` along axis `dim`."""

    dim: int
    start: int


@dataclass(slots=True)
class Rows:
    """State of one walk. axis: row axis of each node seen so far; None: it has none. picked: values
    made of the last token row alone (`last_row.py`). sequence_first: folded values in which the
    batch items of a token follow one another."""

    batch: sympy.Symbol
    sequence: sympy.Symbol
    axis: dict[fx.Node, Axis] = field(default_factory=dict)
    tables: dict[fx.Node, Table] = field(default_factory=dict)
    padding: frozenset[fx.Node] = frozenset()
    picked: set[fx.Node] = field(default_factory=set)
    sequence_first: set[fx.Node] = field(default_factory=set)

    def of(self, value: Any) -> Axis:
        """Row axis of an operand; constants have none."""
        return self.axis.get(value) if isinstance(value, fx.Node) else None

    def batch_of(self, value: Any) -> Axis:
        """Batch axis of an operand."""
        if not isinstance(value, fx.Node) or not isinstance(value.meta["val"], Tensor):
            return None
        holders = [i for i, size in enumerate(sizes(value)) if self.batch in size.free_symbols]
        return holders[0] if holders else None

    def is_constant(self, value: Any) -> bool:
        """True when an operand has neither token rows nor batch items."""
        return self.of(value) is None and self.batch_of(value) is None


def sizes(node: Any) -> list[sympy.Expr]:
    """Sizes of a tensor node as expressions."""
    return [_expression(size) for size in node.meta["val"].shape]


def rank(node: Any) -> int:
    """Number of axes of a tensor node."""
    return len(node.meta["val"].shape)


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def row_axis(rows: Rows, node: fx.Node) -> Axis:
    """The axis of a result that the sequence stands on.

    For ops that are known to keep rows apart: where the rows went, the sizes tell.
    """
    value = node.meta["val"]
    shape = (value if isinstance(value, Tensor) else value[0]).shape
    places = [i for i, s in enumerate(shape) if rows.sequence in _expression(s).free_symbols]
    if len(places) > 1:
        raise mixed(node, "pairs every token row with every other (an outer operation)")
    if not places and any(rows.of(operand) is not None for operand in node.all_input_nodes):
        raise mixed(node, "gives a value without a token axis")
    return places[0] if places else None


def refuse_along(rows: Rows, node: fx.Node, operand: Any, dims: Iterable[int], what: str) -> None:
    """Raise when `dims` of `operand` hold its token rows or its batch items."""
    worked = {int(d) % max(rank(operand), 1) for d in dims}
    if rows.of(operand) in worked:
        raise mixed(node, f"{what} the token axis")
    if rows.batch_of(operand) in worked:
        raise batch_mixed(node, f"{what} the batch axis")


def check_numbers(node: fx.Node, size_ops: frozenset[Any]) -> None:
    """Raise when a size reaches an op as a number, other than as a size."""
    fill = argument(node, "fill_value") if node.target is aten.full.default else None
    for operand in node.all_input_nodes:
        value = operand.meta["val"]
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            is_size = node.target in size_ops and operand is not fill
            if value.node.expr.free_symbols and not is_size:
                raise mixed(node, "computes with the length of the sequence or of the batch")


def check_result(rows: Rows, node: fx.Node, axis: Axis) -> None:
    """Raise unless the result has the sequence on `axis` only and the batch on one axis only."""
    value = node.meta["val"]
    parts = [value] if isinstance(value, Tensor) else [v for v in value if isinstance(v, Tensor)]
    for part in parts:
        _check_sizes(rows, node, [_expression(size) for size in part.shape], axis)


def _check_sizes(rows: Rows, node: fx.Node, shape: list[sympy.Expr], axis: Axis) -> None:
    batch, sequence = rows.batch, rows.sequence
    for position, size in enumerate(shape):
        if size.free_symbols - {batch, sequence}:
            raise unknown(node, "gives a size that is neither the batch nor the sequence")
        if sequence in size.free_symbols and position != axis:
            raise mixed(node, "gives an axis of the sequence's length that is not the token axis")
    if axis is not None and shape[axis] not in (sequence, batch * sequence):
        raise mixed(node, "changes the length of the token axis")
    holders = [size for size in shape if batch in size.free_symbols]
    if len(holders) > 1:
        raise batch_mixed(node, "pairs every batch item with every other (an outer operation)")
    if holders and batch in (holders[0] / batch).free_symbols:
        raise batch_mixed(node, "changes the number of batch items")


def is_folded(rows: Rows, value: Any) -> bool:
    """Whether an operand has rows and batch items on one axis."""
    axis = rows.of(value)
    if axis is None:
        return False
    whole = value.meta["val"]
    size = (whole if isinstance(whole, Tensor) else whole[0]).shape[axis]
    return rows.batch in _expression(size).free_symbols


def check_fold(rows: Rows, node: fx.Node) -> None:
    """Remember how a result's folded axis is ordered: like those of all its folded operands.

    Raises RowsMixedError when they differ.
    """
    folded = [operand for operand in node.all_input_nodes if is_folded(rows, operand)]
    orders = {operand in rows.sequence_first for operand in folded}
    if len(orders) > 1:
        raise mixed(node, "meets values that are folded in different orders on the token axis")
    if orders == {True}:
        rows.sequence_first.add(node)


def reshaped(
    rows: Rows,
    before: list[sympy.Expr],
    after: list[sympy.Expr],
    *,
    is_sequence_first: bool = False,
) -> tuple[Axis, bool]:
    """Row axis after a reshape between sizes that hold the sequence, and whether rows and batch
    items are folded there with the sequence outermost, as `is_sequence_first` says of before.

    Raises ValueError unless rows and batch items stay whole and in order: an axis may be split or
    merged, the batch may become the outer part of an axis, or the inner part of the rows' own.
    """
    symbols = (rows.batch, rows.sequence)
    pending = _atoms(before, symbols[::-1] if is_sequence_first else symbols)
    row_axis: Axis = None
    is_turned = False
    for position, size in enumerate(after):
        taken: list[sympy.Expr] = []
        rest = size
        while rest != 1:
            if not pending:
                raise ValueError
            head = pending[0]
            if head in symbols:
                if head not in rest.free_symbols:
                    raise ValueError
                rest = rest / head
                taken.append(pending.pop(0))
                continue
            # A plain factor: give as much of it as this axis still wants.
            wanted = rest.as_coeff_Mul()[0]
            shared = sympy.gcd(wanted, head)
            if shared == 1:
                raise ValueError
            rest = rest / shared
            pending[0] = head / shared
            if pending[0] == 1:
                pending.pop(0)
            taken.append(shared)
        if rows.sequence in taken:
            row_axis = position
            is_turned = taken == [rows.sequence, rows.batch]
            if not is_turned and taken not in ([rows.sequence], [rows.batch, rows.sequence]):
                raise ValueError
        elif rows.batch in taken[1:]:
            raise ValueError
    return row_axis, is_turned


def _atoms(shape: list[sympy.Expr], symbols: tuple[sympy.Symbol, ...]) -> list[sympy.Expr]:
    """Factors in memory order; neighbouring plain sizes are one factor."""
    atoms: list[sympy.Expr] = []
    for size in shape:
        rest = size
        # Folded axes are in the order of `symbols`: `check_result` and `reshaped` see to it.
        for symbol in symbols:
            if symbol in rest.free_symbols:
                atoms.append(symbol)
                rest = rest / symbol
        if rest == 1:
            continue
        if atoms and atoms[-1] not in symbols:
            atoms[-1] = atoms[-1] * rest
        else:
            atoms.append(rest)
    return atoms
