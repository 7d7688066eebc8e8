"""Which values of a graph must keep the memory layout that they have.

Layout is no part of what most ops mean: they read elements by index. The exceptions are views that
divide memory anew (view, as_strided, a view in another dtype or as complex numbers), ops that
return strides, and ops that this package knows nothing about. Which op is one of them follows from
its schema: a result that aliases an operand is a view, and a view that takes more than axis numbers
(sizes, strides, a dtype, another tensor) or changes the dtype depends on the strides of its
operand, unless it is known to copy when it must (`_COPES`).

A layout matters where such an op reads it, and further up through every op, since results are laid
out like operands, until a copy that fixes the layout whatever it is given.
"""

from __future__ import annotations

import operator
import re
from functools import cache

import torch
from torch import Tensor, fx

from graphopt.ir.graph import Graph, argument, is_call, tensor_inputs
from graphopt.ir.opset import spec_of

aten = torch.ops.aten
# They take sizes, dtypes or another tensor, and give the same values from any layout.
_COPES = frozenset(
    {
        "broadcast_to",
        "contiguous",
        "expand",
        "expand_as",
        "flatten",
        "moveaxis",
        "movedim",
        "narrow",
        "pin_memory",
        "ravel",
        "reshape",
        "reshape_as",
        "split",
        "split_with_sizes",
        "tensor_split",
        "to",
        "type_as",
        "unflatten",
    }
)
_SIZE_READS = frozenset({"sym_size", "sym_numel", "size", "numel"})
_AXES = re.compile(r"(int|int\[\d*\]|SymInt|bool|float|Dimname)\??")


def reads_layout(node: fx.Node) -> bool:
    """True when the result of a call depends on the strides of an operand, or may."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    if target is aten._assert_tensor_metadata.default:
        return argument(node, "stride") is not None
    if _takes_strides(target):
        return True
    if not _is_view(target):
        return False
    value, operand = node.meta["val"], node.args[0]
    # real and imag of complex numbers are strided, other changes of dtype divide memory anew.
    return (
        isinstance(value, Tensor)
        and isinstance(operand, fx.Node)
        and value.dtype.is_complex
        and not operand.meta["val"].dtype.is_complex
    )


def may_alias(node: fx.Node) -> bool:
    """True for calls whose result may lie in the memory of their first operand."""
    target = node.target
    return node.op == "call_function" and (
        target is operator.getitem
        or (isinstance(target, torch._ops.OpOverload) and _is_view(target))
    )


@cache
def _is_view(target: torch._ops.OpOverload) -> bool:
    marks = [result.alias_info for result in target._schema.returns]
    returned = any(mark is not None and not mark.is_write for mark in marks)
    # slice_scatter has the tag, too, and is no view.
    is_copy = torch.Tag.view_copy in target.tags and target._schema.name.endswith("_copy")
    return returned or is_copy or target._schema.name == "aten::_unsafe_view"


@cache
def _takes_strides(target: torch._ops.OpOverload) -> bool:
    """What the schema alone says; see the module docstring."""
    namespace, _, name = target._schema.name.partition("::")
    if namespace not in ("aten", "prims"):
        # graphopt's own ops and those of plugins are defined by their references, on any layout.
        return spec_of(target) is None
    name = name.removesuffix("_copy")
    if name in _COPES:
        return False
    results = target._schema.returns
    if results and not any("Tensor" in str(result.type) for result in results):
        return name not in _SIZE_READS
    if not _is_view(target):
        return False
    # squeeze and permute take `int[]` axes; sizes and strides are `SymInt[]`.
    taken = str(target._schema).partition(", ")[2].rpartition(" -> ")[0]
    others = [kind for kind in taken.removesuffix(")").split(", ") if kind not in ("", "*")]
    return not all(_AXES.fullmatch(kind.partition(" ")[0]) for kind in others)


def fixes_layout(node: fx.Node) -> bool:
    """True for copies whose result is contiguous whatever they are given."""
    if is_call(node, aten.contiguous.default):
        return bool(
            tensor_inputs(node).get("memory_format", torch.contiguous_format)
            == torch.contiguous_format
        )
    is_clone = is_call(node, aten.clone.default)
    return is_clone and tensor_inputs(node).get("memory_format") == torch.contiguous_format


def layout_matters(graph: Graph) -> set[fx.Node]:
    """The values whose layout some op reads, directly or through ops that hand it on; and copies of
    values whose elements share memory, since what is written into a part of the copy must not be
    seen in others."""
    found: set[fx.Node] = set()
    pending = [n for node in graph.nodes if reads_layout(node) for n in node.all_input_nodes]
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        if not fixes_layout(node):
            pending += node.all_input_nodes
    return found | _copies_of_windows(graph)


def _copies_of_windows(graph: Graph) -> set[fx.Node]:
    windows: set[fx.Node] = set()
    copies: set[fx.Node] = set()
    for node in graph.nodes:
        if is_call(node, aten.as_strided.default, aten.unfold.default):
            windows.add(node)
        elif windows.intersection(node.all_input_nodes):
            is_item = node.target is operator.getitem
            is_window = is_item or (may_alias(node) and keeps_layout(node))
            (windows if is_window else copies).add(node)
    return copies


def keeps_layout(node: fx.Node) -> bool:
    """True when a call that returns its operand's values returns its layout as well: it hands the
    operand itself on, and copies nothing."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    if is_call(node, aten.contiguous.default) or not _is_view(target):
        # Dropout that is off has no alias mark in its schema, and returns its operand.
        return is_call(node, aten.dropout.default)
    names = {spec.name for spec in target._schema.arguments}
    is_copy = "copy" in names and argument(node, "copy")
    has_format = "memory_format" in names and argument(node, "memory_format") is not None
    return torch.Tag.view_copy not in target.tags and not is_copy and not has_format
