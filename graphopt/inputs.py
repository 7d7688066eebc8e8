"""What a program's forward accepts: dtype, rank, sizes and ids of every input, checked before it
runs.

The types come from the graph's inputs. Where several axes have one symbolic size (the batch of the
ids and of their mask), the given sizes must agree. An input that an embedding reads as it is must
hold rows of that table, and a size whose positions are looked up in a table must not exceed its
rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.errors import RequestError
from graphopt.ir.graph import Graph, argument, dtype_of, is_call, shape_of
from graphopt.ops import embedding_wq

aten = torch.ops.aten

# They hand on every value unchanged, whatever they do to the shape.
_MOVERS = (
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.expand.default,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.to.dtype,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
)
_COUNTERS = (aten.arange.default, aten.arange.start, aten.arange.start_step)
_TABLES: dict[object, tuple[str, str]] = {
    aten.embedding.default: ("weight", "indices"),
    embedding_wq.SPEC.overload: ("codes_NKp", "ids"),
}


@dataclass(frozen=True, slots=True)
class InputType:
    """Type of one input.

    sizes: a number, or the name of a symbolic size, per axis. limits: per axis, the largest size,
    None where there is none. rows: its values are 0 to rows - 1, None for any.
    """

    name: str
    dtype: torch.dtype
    device: str
    sizes: tuple[int | str, ...]
    limits: tuple[int | None, ...]
    rows: int | None

    def __str__(self) -> str:
        return f"{_short(self.dtype)} [{', '.join(map(str, self.sizes))}]"


def input_types(graph: Graph) -> tuple[InputType, ...]:
    """The types of a captured graph's inputs, in order."""
    limits = dict(graph.limits)
    for name, rows in _position_rows(graph):
        limits[name] = min(rows, limits.get(name, rows))
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return tuple(_input_type(graph, node, limits) for node in inputs)


def longest_sequence(types: Sequence[InputType]) -> int | None:
    """Tokens that the model has positions for, as far as its capture told: the limit of axis 1 of
    the integer inputs `[batch, sequence]`."""
    found = [kind.limits[1] for kind in types if len(kind.sizes) == 2 and kind.dtype == torch.int64]
    return min((limit for limit in found if limit is not None), default=None)


def check_inputs(types: Sequence[InputType], values: Sequence[Any]) -> None:
    """Raise RequestError naming the first input that does not have its type."""
    bound: dict[str, tuple[int, str]] = {}
    for kind, value in zip(types, values, strict=True):
        if not isinstance(value, Tensor):
            raise RequestError(
                f"input {kind.name!r} must be a tensor, {kind}, got {type(value).__name__}"
            )
        found = f"{_short(value.dtype)} {list(value.shape)}"
        if value.dtype != kind.dtype or value.ndim != len(kind.sizes) or value.numel() == 0:
            raise RequestError(f"input {kind.name!r} must be a non-empty {kind}, got {found}")
        if value.device.type != kind.device:
            raise RequestError(
                f"input {kind.name!r} is on {value.device}, the program runs on {kind.device}"
            )
        for axis, (wanted, limit) in enumerate(zip(kind.sizes, kind.limits, strict=True)):
            size = value.shape[axis]
            if isinstance(wanted, int) and size != wanted:
                raise RequestError(
                    f"input {kind.name!r} must be {kind}, got {found}; size {wanted} was fixed by "
                    f"the example: compile with dynamic={{{kind.name!r}: {{{axis}: 'name'}}}} to "
                    "leave it open"
                )
            if limit is not None and size > limit:
                raise RequestError(
                    f"input {kind.name!r} has {size} along axis {axis} ({wanted}), the model "
                    f"takes {limit}"
                )
            if isinstance(wanted, str):
                first, place = bound.setdefault(wanted, (size, f"{kind.name!r} axis {axis}"))
                if first != size:
                    raise RequestError(
                        f"size {wanted!r} is {first} in {place} and {size} in {kind.name!r} axis "
                        f"{axis}; they must be equal"
                    )
        if kind.rows is not None:
            low, high = int(value.min()), int(value.max())
            if low < 0 or high >= kind.rows:
                raise RequestError(
                    f"input {kind.name!r} holds ids {low}..{high}; they must be "
                    f"0..{kind.rows - 1}, the rows of the table they are looked up in"
                )


def _input_type(graph: Graph, node: fx.Node, known_limits: Mapping[str, int]) -> InputType:
    sizes: list[int | str] = []
    limits: list[int | None] = []
    for size in shape_of(node):
        fixed = size if isinstance(size, int) else size.node.maybe_as_int()
        if fixed is not None:
            sizes.append(int(fixed))
            limits.append(None)
            continue
        name = graph.symbols.get(str(size), str(size))
        sizes.append(name)
        limits.append(known_limits.get(name))
    return InputType(
        str(node.target),
        dtype_of(node),
        node.meta["val"].device.type,
        tuple(sizes),
        tuple(limits),
        _rows(node),
    )


def _position_rows(graph: Graph) -> Iterator[tuple[str, int]]:
    """(name of a symbolic size, its largest value) for every table that is read at 0, 1, 2, ... up
    to that size, or from a fixed number on (OPT begins at 2)."""
    for node in graph.nodes:
        if not is_call(node, aten.embedding.default):
            continue
        index, first = argument(node, "indices"), 0
        while is_call(index, *_MOVERS, aten.add.Tensor, aten.add.Scalar):
            if not is_call(index, *_MOVERS):
                shift = index.args[1]
                if not isinstance(shift, int) or len(index.args) > 2 or index.kwargs:
                    break
                first += shift
            index = index.args[0]
        if is_call(index, *_COUNTERS):
            end = argument(index, "end")
            size = end.meta["val"] if isinstance(end, fx.Node) else end
            if str(size) in graph.symbols:
                yield graph.symbols[str(size)], int(shape_of(argument(node, "weight"))[0]) - first


def _rows(node: fx.Node) -> int | None:
    """Rows of the smallest table in which the values of `node` are looked up as they are."""
    found: list[int] = []
    if dtype_of(node).is_floating_point or dtype_of(node) == torch.bool:
        return None
    for user in node.users:
        if is_call(user, *_TABLES):
            table, ids = (argument(user, name) for name in _TABLES[user.target])
            if ids is node:
                found.append(int(shape_of(table)[0]))
        elif is_call(user, *_MOVERS) and user.args[0] is node:
            rows = _rows(user)
            found += [] if rows is None else [rows]
    return min(found, default=None)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
