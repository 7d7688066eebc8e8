"""The numeric twin of a golden rewrite: the graphs before and after, run on the same inputs.

A golden file says that a rewrite is the one that was accepted, not that it is right. So the two
graphs are also run by the ops' definitions, on random inputs of two sizes, and held to the tier of
the pass: bit for bit when it is exact. What is run:

    inputs     random, as the graph's own inputs say: ids within their tables, sizes within their
               limits; sizes that are numbers stay as they are
    weights    the graph's own; low-bit ones are dequantized where the graph names their matrix
    serving    a serving graph is given whole prompts without padding, in fresh cache blocks

A pass of the tier `approximate` changes the model on purpose and is not judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.check.numerics import allowance, excess, keeps_tier, measure
from graphopt.check.oracle import outputs_of, random_inputs
from graphopt.errors import GoldenError
from graphopt.ir.graph import Graph
from graphopt.passes.base import Pass

SIZES = ((2, 11), (3, 6))
"""Symbolic sizes of the two runs: on axis 0, on the other axes."""


def check_twin(pass_: Pass[Any], before: Graph, after: Graph) -> None:
    """Run both graphs and compare.

    Raises GoldenError naming the pass, the error, what its tier allows and the sizes, and where
    the graph before cannot be run.
    """
    if pass_.tier.kind == "approximate":
        return
    graphs = [_with_dense_weights(graph) for graph in (before, after)]
    for seed, (first, others) in enumerate(SIZES):
        inputs = _inputs(before, after, seed, first, others)
        shapes = ", ".join(str(list(tensor.shape)) for tensor in inputs)
        try:
            expected = outputs_of(graphs[0], inputs)
        except RuntimeError as error:
            raise GoldenError(
                f"the graph before {pass_.name!r} cannot be run on random inputs of {shapes}: "
                f"{error}"
            ) from error
        found = outputs_of(graphs[1], inputs)
        change = measure(pass_.name, found, expected)
        if not keeps_tier(pass_, change, found, expected):
            allowed = allowance(pass_, expected)
            raise GoldenError(
                f"pass {pass_.name!r} {excess(pass_, change, allowed)}, on random inputs of "
                f"{shapes}"
            )


def _inputs(before: Graph, after: Graph, seed: int, first: int, others: int) -> Sequence[Tensor]:
    """Inputs of the graph before; for a serving graph the prompts, and masks that hide nothing."""
    made = random_inputs(before, seed, first=first, others=others)
    if after.dialect == "captured":
        return made
    if before.dialect == "captured":
        return [made[0], *(torch.ones_like(tensor) for tensor in made[1:])]
    # Both are serving graphs: their first input is the ids of a step, one after the other.
    (tokens, *_) = made
    return [tokens[:1].expand(first * others).reshape(first, others)]


def _with_dense_weights(graph: Graph) -> Graph:
    """`graph`; the matrices that low-bit weights replace hold what these stand for."""
    dense = {
        name: packed.dequantize(graph.weights[name].dtype)
        for name, packed in graph.packed.items()
        if name in graph.weights
    }
    if not dense:
        return graph
    copied = graph.copy()
    copied.weights.update(dense)
    return copied
