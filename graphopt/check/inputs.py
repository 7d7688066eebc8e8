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
from graphopt.ir.limits import Limit, highest
from graphopt.ir.plain_tensor import why_not_plain
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
_TRACERS = {
    torch._C._TorchDispatchModeKey.FAKE: "FakeTensorMode",
    torch._C._TorchDispatchModeKey.PROXY: "make_fx",
    torch._C._TorchDispatchModeKey.FUNCTIONAL: "functionalisation",
}
_COUNTERS = (aten.arange.default, aten.arange.start, aten.arange.start_step)
_TABLES: dict[object, tuple[str, str]] = {
    aten.embedding.default: ("weight", "indices"),
    embedding_wq.SPEC.overload: ("codes_NKp", "ids"),
}


@dataclass(frozen=True, slots=True)
class InputType:
    """Type of one input.

    sizes: a number, or the name of a symbolic size, per axis. rows: its values are 0 to rows - 1,
    None for any.
    """

    name: str
    dtype: torch.dtype
    device: str
    sizes: tuple[int | str, ...]
    rows: int | None

    def __str__(self) -> str:
        return f"{_short(self.dtype)} [{', '.join(map(str, self.sizes))}]"


def input_types(graph: Graph) -> tuple[InputType, ...]:
    """The types of a captured graph's inputs, in order."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return tuple(_input_type(graph, node) for node in inputs)


def size_limits(graph: Graph) -> tuple[Limit, ...]:
    """The limits of the graph, those of its tables of positions among them."""
    tables = [Limit(name, "<=", rows, "op", source) for name, rows, source in _position_rows(graph)]
    known = {(limit.size, limit.relation, limit.number) for limit in graph.limits}
    return (
        *graph.limits,
        *(limit for limit in tables if (limit.size, limit.relation, limit.number) not in known),
    )


def sequence_name(types: Sequence[InputType]) -> str | None:
    """Name of the size of axis 1 of the integer inputs `[batch, sequence]`."""
    for kind in types:
        if len(kind.sizes) == 2 and kind.dtype == torch.int64 and isinstance(kind.sizes[1], str):
            return kind.sizes[1]
    return None


def longest_sequence(graph: Graph) -> int | None:
    """Tokens that the model has positions for, as far as its capture told."""
    name = sequence_name(input_types(graph))
    limit = None if name is None else highest(size_limits(graph), name)
    return None if limit is None else limit.number


def check_inputs(
    types: Sequence[InputType], values: Sequence[Any], limits: Sequence[Limit] = ()
) -> None:
    """Raise RequestError naming the first input that does not have its type, or the first limit
    that the sizes do not keep."""
    for key, name in _TRACERS.items():
        if torch._C._get_dispatch_mode(key) is not None:
            raise RequestError(f"a program computes values, and {name} traces without them")
    bound: dict[str, tuple[int, str, int]] = {}
    for kind, value in zip(types, values, strict=True):
        if not isinstance(value, Tensor):
            raise RequestError(
                f"input {kind.name!r} must be a tensor, {kind}, got {type(value).__name__}"
            )
        reason = why_not_plain(value)
        if reason is not None:
            raise RequestError(f"input {kind.name!r} {reason}")
        found = f"{_short(value.dtype)} {list(value.shape)}"
        if value.dtype != kind.dtype or value.ndim != len(kind.sizes) or value.numel() == 0:
            raise RequestError(f"input {kind.name!r} must be a non-empty {kind}, got {found}")
        if value.device.type != kind.device:
            raise RequestError(
                f"input {kind.name!r} is on {value.device}, the program runs on {kind.device}"
            )
        for axis, wanted in enumerate(kind.sizes):
            size = value.shape[axis]
            if isinstance(wanted, int) and size != wanted:
                raise RequestError(
                    f"input {kind.name!r} must be {kind}, got {found}; size {wanted} was fixed by "
                    f"the example: compile with dynamic={{{kind.name!r}: {{{axis}: 'name'}}}} to "
                    "leave it open"
                )
            if isinstance(wanted, str):
                first, other, its = bound.setdefault(wanted, (size, kind.name, axis))
                if first != size:
                    raise RequestError(
                        f"size {wanted!r} is {first} in {other!r} axis {its} and {size} in "
                        f"{kind.name!r} axis {axis}; they must be equal"
                    )
        if kind.rows is not None:
            try:
                low, high = int(value.min()), int(value.max())
            # There is no memory for a tensor that many views of one number make huge.
            except RuntimeError as error:
                told = f"input {kind.name!r}, {found}, cannot be read: {error}"
                raise RequestError(told) from error
            if low < 0 or high >= kind.rows:
                raise RequestError(
                    f"input {kind.name!r} holds ids {low}..{high}; they must be "
                    f"0..{kind.rows - 1}, the rows of the table they are looked up in"
                )
    _check_limits(limits, bound)


def _check_limits(limits: Sequence[Limit], bound: Mapping[str, tuple[int, str, int]]) -> None:
    """bound: name of a size -> its number, and the input and axis that gave it."""
    sizes = {name: size for name, (size, _, _) in bound.items()}
    for limit in limits:
        if limit.names <= sizes.keys() and not limit.holds(sizes):
            given = " and ".join(
                f"input {argument!r} has {size} along axis {axis} ({name})"
                for name, (size, argument, axis) in bound.items()
                if name in limit.names
            )
            raise RequestError(f"{given}; {limit.reason()}")


def _input_type(graph: Graph, node: fx.Node) -> InputType:
    sizes: list[int | str] = []
    for size in shape_of(node):
        fixed = size if isinstance(size, int) else size.node.maybe_as_int()
        sizes.append(graph.symbols.get(str(size), str(size)) if fixed is None else int(fixed))
    return InputType(
        str(node.target), dtype_of(node), node.meta["val"].device.type, tuple(sizes), _rows(node)
    )


def _position_rows(graph: Graph) -> Iterator[tuple[str, int, str]]:
    """(name of a symbolic size, its largest value, line) for every table that is read at 0, 1, 2,
    ... up to that size, or from a fixed number on (OPT begins at 2)."""
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
                rows = int(shape_of(argument(node, "weight"))[0])
                yield graph.symbols[str(size)], rows - first, node.meta["source"]


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
