"""The verifier: what must be true of every graph, checked after every pass.

1. SSA: every operand is defined before it is read, and belongs to this graph.
2. Every value node has `val`, and `layer`, `source`, `history` are present; no two calls have the
   same `number`.
3. Shapes and dtypes of new nodes are what the op says for its operands.
4. No dead nodes.
5. Placeholders are exactly the declared inputs; weights exist with the shape the node has.
6. Only cache inputs are written to.
7. Only known ops: ATen, those that `define` made (graphopt's, plugins') and integer arithmetic on
   sizes.
8. Values are strided tensors with memory, of a dtype that graphs have.
9. Outputs are tensors; a serving graph has the form of `serving_form.py`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt.errors import VerifyError
from graphopt.ir.builder import GraphBuilder
from graphopt.ir.graph import Graph, argument, where
from graphopt.ir.opset import checks_values, is_impure, spec_of
from graphopt.ir.serving_form import check_serving_form
from graphopt.ir.shapes import DTYPE_NAMES, told_dtypes


def verify(graph: Graph, after: str = "", trusted: Collection[fx.Node] = ()) -> None:
    """Raise VerifyError naming the pass, the node and the broken invariant.

    trusted: nodes whose shapes were inferred before this pass; the others are inferred again.
    """
    blame = f"after {after}: " if after else ""
    seen: set[fx.Node] = set()
    numbers: set[int] = set()
    builder = GraphBuilder(graph)
    placeholders: list[str] = []
    for node in graph.nodes:
        for operand in node.all_input_nodes:
            if operand not in seen:
                raise VerifyError(
                    f"{blame}{where(node)} reads %{operand.name} before it is defined"
                )
        seen.add(node)
        if node.op == "output":
            continue
        missing = [key for key in ("val", "layer", "source", "history") if key not in node.meta]
        if missing:
            raise VerifyError(f"{blame}{where(node)} has no {missing[0]!r}")
        _check_values(node, blame)
        if node.op == "placeholder":
            placeholders.append(str(node.target))
        elif node.op == "get_attr":
            _check_weight(graph, node, blame)
        elif node.op == "call_function":
            number = node.meta.get("number")
            if number is None or number in numbers:
                raise VerifyError(f"{blame}{where(node)} has no number of its own ({number})")
            numbers.add(number)
            _check_call(graph, node, blame)
            if node not in trusted:
                _check_inferred(builder, node, blame)
        else:
            raise VerifyError(f"{blame}{node.op} node %{node.name} is not part of the IR")
        has_effect = is_impure(node.target) or checks_values(node.target)
        if not node.users and node.op != "placeholder" and not has_effect:
            raise VerifyError(f"{blame}{where(node)} is dead")
    for node in graph.output_nodes:
        if not isinstance(node.meta["val"], Tensor):
            raise VerifyError(f"{blame}{where(node)} is returned and is no tensor")
    check_serving_form(graph, blame)
    declared = [spec.name for spec in graph.inputs]
    if placeholders != declared:
        raise VerifyError(f"{blame}inputs are {placeholders}, declared are {declared}")


def _check_values(node: fx.Node, blame: str) -> None:
    for value in pytree.tree_leaves(node.meta["val"]):
        if not isinstance(value, Tensor):
            continue
        if value.layout != torch.strided or value.dtype not in DTYPE_NAMES:
            raise VerifyError(
                f"{blame}{where(node)} gives a tensor of {value.dtype} ({value.layout}), which no "
                f"graph holds; it holds dense {told_dtypes()}"
            )
        if value.device.type == "meta":
            raise VerifyError(f"{blame}{where(node)} gives a tensor on meta, which has no values")


def _check_weight(graph: Graph, node: fx.Node, blame: str) -> None:
    name = str(node.target)
    if name not in graph.weights:
        raise VerifyError(f"{blame}weight {name!r} has no data")
    data, value = graph.weights[name], node.meta["val"]
    if tuple(data.shape) != tuple(value.shape) or data.dtype != value.dtype:
        raise VerifyError(
            f"{blame}weight {name!r} is {data.dtype} {tuple(data.shape)}, "
            f"its node says {value.dtype} {tuple(value.shape)}"
        )


def _check_call(graph: Graph, node: fx.Node, blame: str) -> None:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        module = getattr(target, "__module__", "")
        if module not in (operator.__name__, math.__name__, "_operator", "torch"):
            raise VerifyError(f"{blame}{target} is not an op of the IR ({where(node)})")
        return
    # A model's own ops may stay in a captured graph; a serving graph needs a row rule for each.
    is_known = target.namespace in ("aten", "prims") or spec_of(target) is not None
    if graph.dialect == "serving" and not is_known:
        raise VerifyError(f"{blame}namespace {target.namespace!r} is not allowed ({where(node)})")
    if is_impure(target):
        caches = {spec.name for spec in graph.inputs if spec.kind == "cache"}
        for spec in target._schema.arguments:
            if spec.alias_info is not None and spec.alias_info.is_write:
                written = argument(node, spec.name)
                if not (isinstance(written, fx.Node) and written.target in caches):
                    raise VerifyError(
                        f"{blame}{where(node)} writes to %{written}, which is no cache input"
                    )


def _check_inferred(builder: GraphBuilder, node: fx.Node, blame: str) -> None:
    assert callable(node.target)
    try:
        inferred = builder.infer(node.target, node.args, node.kwargs)
    except Exception as error:
        raise VerifyError(f"{blame}{where(node)} does not type-check: {error}") from error
    if not _same_type(inferred, node.meta["val"]):
        raise VerifyError(
            f"{blame}{where(node)} is recorded as {_describe(node.meta['val'])} "
            f"but its operands give {_describe(inferred)}"
        )


def _same_type(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and str(tuple(left.shape)) == str(tuple(right.shape))
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(map(_same_type, left, right))
    return type(left) is type(right)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return str(value)
