"""merge_qkv: linears that read the same input become one wider linear and a split.

    before   q = aten.linear(x, @q, bq)   k = aten.linear(x, @k, bk)   v = aten.linear(x, @v, bv)
    after    y = aten.linear(x, @merged, @merged.bias)    q, k, v = aten.split_with_sizes(y, ..)

Query, key and value projections; gate and up as well, and all five where attention and MLP read the
same norm. The weights are concatenated now, in a new weight; the old ones are forgotten. When only
some have a bias the others get zeros. Exact up to the rounding of the wider product.

Off unless asked for (`compile(..., enable=["merge_qkv"])`): the native CPU kernels are as fast on
separate matrices, whose packing they may share with other graphs, and the new weight is a second
copy for as long as the model itself is alive. It pays where one launch is dearer than its work.

Never merges packed weights (their codes are read in place) or weights that others read too.
"""

from __future__ import annotations

import operator
import os.path
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from graphopt.ir.builder import GraphBuilder, replace
from graphopt.ir.graph import Graph, argument, dtype_of, is_call, shape_of
from graphopt.passes.base import Pass, Reject, Stage, Tier
from graphopt.passes.registry import register

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Parallel:
    """Linears of one input, in graph order."""

    linears: tuple[fx.Node, ...]


@register
class MergeQkv(Pass[Parallel]):
    """See the module docstring."""

    name: ClassVar[str] = "merge_qkv"
    stage: ClassVar[Stage] = "fuse"
    after: ClassVar[tuple[str, ...]] = ("fuse_attention", "fuse_mlp", "fuse_norm", "fuse_rope")
    tier: ClassVar[Tier] = Tier("reassociating", 1e-6)
    default: ClassVar[bool] = False

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        """The first linear of each input that has several."""
        linears = graph.calls(aten.linear.default)
        return [n for n in linears if (group := _siblings(n))[0] is n and len(group) > 1]

    def check(self, graph: Graph, node: fx.Node) -> Parallel | Reject:
        """Dense weights of one dtype that nobody else reads."""
        linears = _siblings(node)
        for linear in linears:
            weight, bias = argument(linear, "weight"), argument(linear, "bias")
            operands = [operand for operand in (weight, bias) if operand is not None]
            for operand in operands:
                reason = _unusable(graph, linear, operand)
                if reason is not None:
                    return reason
            if len(shape_of(weight)) != 2:
                return Reject("weight-shape", "a weight is not a matrix", linear)
            first = argument(linears[0], "weight")
            if any(dtype_of(operand) != dtype_of(first) for operand in operands):
                return Reject(
                    "weight-dtype",
                    "the weights differ in dtype",
                    linear,
                    "keep all projections of one input in one dtype",
                )
        return Parallel(tuple(linears))

    def rewrite(self, builder: GraphBuilder, bound: Parallel) -> None:
        """Concatenate, multiply once, split; parts keep the layer of what they replace."""
        graph, linears = builder.graph, bound.linears
        name = _merged_name(graph, [str(argument(n, "weight").target) for n in linears])
        weights = [graph.weights[str(argument(n, "weight").target)] for n in linears]
        widths = [int(weight.shape[0]) for weight in weights]
        with torch.no_grad(), builder.at(linears[0]):
            weight = builder.weight(f"{name}.weight", torch.cat(weights), like=linears)
            operands = [argument(linears[0], "input"), weight]
            if any(argument(n, "bias") is not None for n in linears):
                biases = [_bias(graph, n, w) for n, w in zip(linears, weights, strict=True)]
                operands.append(builder.weight(f"{name}.bias", torch.cat(biases), like=linears))
            wide = builder.emit(aten.linear.default, operands, like=linears)
            parts = builder.emit(aten.split_with_sizes.default, [wide, widths, -1], like=[wide])
            items = [
                builder.emit(operator.getitem, [parts, i], like=[n]) for i, n in enumerate(linears)
            ]
        for item, linear in zip(items, linears, strict=True):
            item.meta["layer"] = linear.meta["layer"]
            replace(graph, linear, item)


def _siblings(linear: fx.Node) -> list[fx.Node]:
    """All linears that read the input of `linear`, in graph order."""
    x = argument(linear, "input")
    users = [u for u in x.users if is_call(u, aten.linear.default) and argument(u, "input") is x]
    return sorted(users)


def _unusable(graph: Graph, linear: fx.Node, operand: fx.Node) -> Reject | None:
    """Why a weight or bias cannot move into a new weight."""
    name = str(operand.target)
    if operand.op != "get_attr":
        return Reject("weight-computed", "a weight is computed by the graph", linear)
    if name in graph.packed or graph.weights[name].device.type == "meta":
        return Reject(
            "weight-packed",
            f"{name} is packed and stays as it is",
            linear,
            'load the model with weights="dense"',
        )
    readers = [n for n in graph.nodes if n.op == "get_attr" and n.target == operand.target]
    if sum(len(reader.users) for reader in readers) > 1:
        return Reject("weight-shared", f"{name} is read elsewhere as well", linear)
    return None


def _bias(graph: Graph, linear: fx.Node, weight: Tensor) -> Tensor:
    bias = argument(linear, "bias")
    return weight.new_zeros(weight.shape[0]) if bias is None else graph.weights[str(bias.target)]


def _merged_name(graph: Graph, names: list[str]) -> str:
    """`merged.<common module>.q_proj_k_proj_v_proj`, numbered when taken."""
    paths = [name.removesuffix(".weight").split(".") for name in names]
    common = os.path.commonprefix(paths)
    own = "_".join("_".join(path[len(common) :]) for path in paths)
    stem = ".".join(["merged", *common, own])
    number, name = 0, stem
    while f"{name}.weight" in graph.weights or f"{name}.bias" in graph.weights:
        number += 1
        name = f"{stem}_{number}"
    return name
