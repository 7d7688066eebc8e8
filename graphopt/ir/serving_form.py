"""The form of a serving graph, which executables rely on: its inputs, its caches, its one result.

What a step is given lies in memory in this order and with these types. A graph that says otherwise
would read other memory than was meant.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphopt.errors import VerifyError
from graphopt.ir.graph import Graph, argument, where
from graphopt.ir.opset import spec_of
from graphopt.ir.step import STEP


def check_serving_form(graph: Graph, blame: str = "") -> None:
    """Raise VerifyError for a serving graph whose inputs or result are not these, or whose cache
    ops follow other numbers into memory than the step inputs. Other graphs pass."""
    if graph.dialect != "serving":
        return
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    steps, caches = inputs[: len(STEP)], inputs[len(STEP) :]
    names = [str(node.target) for node in steps]
    if names != [step.name for step in STEP]:
        raise VerifyError(f"{blame}a serving graph does not begin with the inputs {names}")
    kinds = [spec.kind for spec in graph.inputs]
    if kinds != ["user"] * len(steps) + ["cache"] * len(caches) or len(caches) % 2:
        raise VerifyError(f"{blame}the inputs after a step's are not caches, in pairs")
    for node, step in zip(steps, STEP, strict=True):
        found = node.meta["val"]
        if found.dtype != torch.int64 or _axes(graph, found) != list(step.axes):
            wanted = f"i64[{', '.join(step.axes)}]"
            raise VerifyError(f"{blame}step input %{node.target} is not {wanted}")
    for node in caches:
        _check_cache(node, blame)
    _check_result(graph, blame)
    for node in graph.nodes:
        _check_followed(node, blame)


def _axes(graph: Graph, value: Tensor) -> list[str]:
    return [graph.symbols.get(str(size), str(size)) for size in value.shape]


def _check_cache(node: fx.Node, blame: str) -> None:
    value = node.meta["val"]
    is_fine = value.ndim == 4 and value.is_floating_point()
    # Every size but the number of blocks and their length is the model's.
    if not is_fine or not all(isinstance(size, int) and size > 0 for size in value.shape[2:]):
        raise VerifyError(
            f"{blame}cache %{node.target} is not floats [blocks, block_size, heads, width]"
        )


def _check_result(graph: Graph, blame: str) -> None:
    outputs = graph.output_nodes
    values = [node.meta["val"] for node in outputs]
    is_one = len(values) == 1 and values[0].ndim == 2 and values[0].is_floating_point()
    if not is_one or _axes(graph, values[0])[0] != "logit_rows":
        raise VerifyError(f"{blame}a serving graph returns logits [logit_rows, vocabulary] alone")
    if not isinstance(values[0].shape[1], int) or outputs[0].op != "call_function":
        raise VerifyError(f"{blame}the logits of a serving graph have no fixed vocabulary")


def _check_followed(node: fx.Node, blame: str) -> None:
    spec = spec_of(node.target)
    for operand, name in spec.step_inputs.items() if spec else ():
        value = argument(node, operand)
        if not isinstance(value, fx.Node) or value.op != "placeholder" or value.target != name:
            raise VerifyError(f"{blame}{operand} of {where(node)} is not the step input {name!r}")
