"""Lowering of the ops that read a weight in a kernel's layout: embeddings and linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.codegen.cpu.abi import Op
from graphopt.codegen.cpu.lower import Lowering, Rule, is_vector, tensor_floats
from graphopt.codegen.cpu.views import Extent, View, row_major
from graphopt.ir.graph import argument
from graphopt.ops import embedding_wq, linear_wq

aten = torch.ops.aten


def embedding(lowering: Lowering, node: fx.Node) -> bool:
    """Rows of a dense table."""
    return _embed(lowering, node, argument(node, "weight"), argument(node, "indices"), 0)


def embedding_low_bit(lowering: Lowering, node: fx.Node) -> bool:
    """Rows of a packed table."""
    bits = int(argument(node, "bits"))
    return _embed(lowering, node, argument(node, "codes_NKp"), argument(node, "ids"), bits)


def _embed(lowering: Lowering, node: fx.Node, table: fx.Node, ids: fx.Node, bits: int) -> bool:
    indices = lowering.view(ids)
    flat = lowering.rows_by_width(indices)
    if table.op != "get_attr" or flat is None or flat[2] != 1 or indices.dtype != torch.int64:
        return False
    # The kernel reads ids that lie side by side.
    if indices.strides != row_major(indices.extents):
        return False
    out = lowering.output(node)
    rows, out_stride, width = lowering.rows_by_width(out) or (None, 0, 0)
    if rows is None or not tensor_floats(out):
        return False
    table_rows, table_width = _matrix_shape(table, bits)
    if table_width != width:
        return False
    weight = _matrix(lowering, table, bits)
    attrs_i = (0, table_rows)
    steps = [[out_stride], [flat[1]], []]
    lowering.add(Op.OP_EMBED, [out, indices, weight], [rows, Extent(width)], steps, attrs_i, (1.0,))
    return True


def _matrix(lowering: Lowering, node: fx.Node, bits: int) -> View:
    """A weight that is read in a kernel layout. Its kind is filled in when it is packed."""
    name = str(node.target)
    if bits:
        name = name.removesuffix(".codes")
    buffer = lowering.plan.external(f"matrix:{name}")
    lowering.matrices[name] = name
    return View(buffer, torch.uint8, (), ())


def _matrix_shape(node: fx.Node, bits: int) -> tuple[int, int]:
    """(rows, columns) of a weight; bits: of its codes, 0 for a dense one."""
    rows, columns = node.meta["val"].shape
    return int(rows), int(columns) * (2 if bits == 4 else 1)


def linear(lowering: Lowering, node: fx.Node) -> bool:
    """A dense linear layer."""
    weight, bias = argument(node, "weight"), argument(node, "bias")
    return _linear(lowering, node, argument(node, "input"), weight, bias, 0, 0)


def linear_low_bit(lowering: Lowering, node: fx.Node) -> bool:
    """A packed linear layer."""
    mode = 1 if argument(node, "activation") == "int8" else 0
    weight, bias = argument(node, "codes_NKp"), argument(node, "bias_N")
    bits = int(argument(node, "bits"))
    return _linear(lowering, node, argument(node, "x"), weight, bias, bits, mode)


def _linear(
    lowering: Lowering, node: fx.Node, x: fx.Node, weight: Any, bias: Any, bits: int, mode: int
) -> bool:
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return False
    if len(weight.meta["val"].shape) != 2:
        return False
    source = lowering.view(x)
    columns = source.extents[-1].mult
    flat = lowering.rows_by_width(source)
    if flat is None or flat[2] != columns:
        source = lowering.dense(source)
        flat = lowering.rows_by_width(source)
    out = lowering.output(node)
    flat_out = lowering.rows_by_width(out)
    if flat is None or flat_out is None or flat[2] != columns or not tensor_floats(source, out):
        return False
    rows, out_stride, width = flat_out
    if _matrix_shape(weight, bits) != (width, columns):
        return False
    biases = [] if bias is None else [lowering.view(bias)]
    if not all(is_vector(view, width) for view in biases):
        return False
    operands = [out, source, _matrix(lowering, weight, bits), *biases]
    steps: list[Any] = [[out_stride], [flat[1]], *([] for _ in range(1 + len(biases)))]
    attrs_i = (0, mode, int(bias is not None), 0)
    dims = [rows, Extent(width), Extent(columns)]
    lowering.add(Op.OP_LINEAR, operands, dims, steps, attrs_i)
    return True


RULES: dict[object, Rule] = {
    aten.embedding.default: embedding,
    embedding_wq.SPEC.overload: embedding_low_bit,
    aten.linear.default: linear,
    linear_wq.SPEC.overload: linear_low_bit,
}
