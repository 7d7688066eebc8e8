"""Lowering of shape ops: views, never instructions, unless a reshape needs a dense copy first."""

from __future__ import annotations

import operator

import torch
from torch import fx

from graphopt.codegen.cpu.abi import Op, Sym
from graphopt.codegen.cpu.dtypes import NATIVE_DTYPES
from graphopt.codegen.cpu.lower import Lowering, Rule
from graphopt.codegen.cpu.views import Extent, row_major
from graphopt.ir.graph import argument, axis_of

aten = torch.ops.aten


def reshape(lowering: Lowering, node: fx.Node) -> bool:
    """Same elements, other axes."""
    source = lowering.view(node.args[0])
    extents = lowering.extents(node)
    view = source.reshaped(extents) or lowering.dense(source).reshaped(extents)
    if view is None:
        return False
    lowering.views[node] = view
    return True


def transpose(lowering: Lowering, node: fx.Node) -> bool:
    """Two axes swapped."""
    source = lowering.view(node.args[0])
    rank = len(source.extents)
    if not rank:
        lowering.views[node] = source
        return True
    first, second = (
        (int(argument(node, "dim0")), int(argument(node, "dim1")))
        if node.target is aten.transpose.int
        else (0, rank - 1)
    )
    order = list(range(rank))
    order[axis_of(first, rank)], order[axis_of(second, rank)] = (
        order[axis_of(second, rank)],
        order[axis_of(first, rank)],
    )
    lowering.views[node] = source.permuted(order)
    return True


def permute(lowering: Lowering, node: fx.Node) -> bool:
    """Axes in the given order."""
    source = lowering.view(node.args[0])
    rank = len(source.extents)
    lowering.views[node] = source.permuted([axis_of(d, rank) for d in argument(node, "dims")])
    return True


def expand(lowering: Lowering, node: fx.Node) -> bool:
    """Broadcast by stride 0."""
    lowering.views[node] = lowering.view(node.args[0]).expanded(lowering.extents(node))
    return True


def same(lowering: Lowering, node: fx.Node) -> bool:
    """The graph is functional, so a copy is the original."""
    lowering.views[node] = lowering.view(node.args[0])
    return True


def slice_(lowering: Lowering, node: fx.Node) -> bool:
    """A range of a plain axis."""
    source = lowering.view(node.args[0])
    axis = axis_of(argument(node, "dim"), len(source.extents))
    extent = lowering.extents(node)[axis]
    start = argument(node, "start") or 0
    if source.extents[axis].sym is not Sym.SYM_ONE:
        if extent != source.extents[axis]:
            return False
        lowering.views[node] = source
        return True
    if not isinstance(start, int):
        return False
    size = source.extents[axis].mult
    # As torch does: what begins before the axis begins with it.
    begin = min(start, size) if start >= 0 else max(start + size, 0)
    lowering.views[node] = source.narrowed(axis, begin, extent, int(argument(node, "step")))
    return True


def select(lowering: Lowering, node: fx.Node) -> bool:
    """One index of a plain axis."""
    source = lowering.view(node.args[0])
    axis = axis_of(argument(node, "dim"), len(source.extents))
    index = argument(node, "index")
    if source.extents[axis].sym is not Sym.SYM_ONE or not isinstance(index, int):
        return False
    begin = index if index >= 0 else index + source.extents[axis].mult
    view = source.narrowed(axis, begin, Extent(1)).reshaped(lowering.extents(node))
    if view is None:
        return False
    lowering.views[node] = view
    return True


def split(lowering: Lowering, node: fx.Node) -> bool:
    """Ranges of a plain axis."""
    source = lowering.view(node.args[0])
    axis = axis_of(argument(node, "dim"), len(source.extents))
    if source.extents[axis].sym is not Sym.SYM_ONE:
        return False
    begin, parts = 0, []
    for part in node.meta["val"]:
        size = int(part.shape[axis])
        parts.append(source.narrowed(axis, begin, Extent(size)))
        begin += size
    lowering.parts[node] = parts
    return True


def unbind(lowering: Lowering, node: fx.Node) -> bool:
    """Every index of a plain axis."""
    source = lowering.view(node.args[0])
    axis = axis_of(argument(node, "dim"), len(source.extents))
    extent = source.extents[axis]
    if extent.sym is not Sym.SYM_ONE:
        return False
    rest = (*source.extents[:axis], *source.extents[axis + 1 :])
    parts = [source.narrowed(axis, i, Extent(1)).reshaped(rest) for i in range(extent.mult)]
    if any(part is None for part in parts):
        return False
    lowering.parts[node] = [part for part in parts if part is not None]
    return True


def item(lowering: Lowering, node: fx.Node) -> bool:
    """One part of a split, one tensor of an unbind."""
    source, index = node.args[:2]
    if source not in lowering.parts or not isinstance(index, int):
        return False
    lowering.views[node] = lowering.parts[source][index]  # type: ignore[index]
    return True


def cat(lowering: Lowering, node: fx.Node) -> bool:
    """A copy into each part of the result."""
    parts = [lowering.view(part) for part in argument(node, "tensors")]
    extents = lowering.extents(node)
    axis = axis_of(argument(node, "dim"), len(extents))
    dtype = node.meta["val"].dtype
    if extents[axis].sym is not Sym.SYM_ONE or any(p.dtype != dtype for p in parts):
        return False
    out = lowering.output(node)
    begin = 0
    for part in parts:
        size = part.extents[axis]
        lowering.copy(part, out.narrowed(axis, begin, size))
        begin += size.mult
    return True


def repeat(lowering: Lowering, node: fx.Node) -> bool:
    """Each element of a plain axis several times: that many strided copies."""
    source, repeats = lowering.view(node.args[0]), argument(node, "repeats")
    if argument(node, "dim") is None:
        return False
    axis = axis_of(argument(node, "dim"), len(source.extents))
    extent = source.extents[axis]
    if extent.sym is not Sym.SYM_ONE or extent.is_one:
        return False
    out = lowering.output(node)
    for place in range(repeats):
        lowering.copy(source, out.narrowed(axis, place, extent, repeats))
    return True


def index_select(lowering: Lowering, node: fx.Node) -> bool:
    """Token rows picked by number."""
    source, rows = lowering.view(node.args[0]), lowering.view(argument(node, "index"))
    axis = int(argument(node, "dim"))
    if source.extents[axis].sym is Sym.SYM_ONE or source.dtype not in NATIVE_DTYPES:
        return False
    # The kernel reads int64 numbers that lie side by side.
    if rows.dtype != torch.int64 or rows.strides != row_major(rows.extents):
        return False
    flat = lowering.rows_by_width(source)
    if flat is None:
        source = lowering.dense(source)
        flat = lowering.rows_by_width(source)
    out = lowering.output(node)
    flat_out = lowering.rows_by_width(out)
    if flat is None or flat_out is None:
        return False
    source_rows, stride, width = flat
    count, out_stride, _ = flat_out
    lowering.add(
        Op.OP_GATHER_ROWS,
        [out, source, rows],
        [count, Extent(width), source_rows],
        [[out_stride], [stride], [1]],
    )
    return True


RULES: dict[object, Rule] = {
    aten.unsqueeze.default: reshape,
    aten.squeeze.dim: reshape,
    aten.squeeze.dims: reshape,
    aten.reshape.default: reshape,
    aten.view.default: reshape,
    aten.flatten.using_ints: reshape,
    aten.unflatten.int: reshape,
    aten._unsafe_view.default: reshape,
    aten.transpose.int: transpose,
    aten.t.default: transpose,
    aten.permute.default: permute,
    aten.expand.default: expand,
    aten.contiguous.default: same,
    aten.alias.default: same,
    aten.detach.default: same,
    aten.clone.default: same,
    aten.slice.Tensor: slice_,
    aten.select.int: select,
    aten.cat.default: cat,
    aten.repeat_interleave.self_int: repeat,
    aten.chunk.default: split,
    aten.split.Tensor: split,
    aten.split_with_sizes.default: split,
    aten.unbind.int: unbind,
    operator.getitem: item,
    aten.index_select.default: index_select,
}
