"""What a mask says, proven: causal, sliding window, everything visible, or those and padding.

A mask subgraph qualifies when every node of it belongs to a closed list of index operations (iota
over the sequence, shape changes, comparisons of indices with small constants, boolean algebra,
fills) or is a 2-D padding input. Such a subgraph is a boolean function of q - k with thresholds at
most C apart, C the sum of its integer constants; so it is determined by its values on any grid
longer than 2C + 2, and evaluating it there *is* the proof. Padding inputs are evaluated as random
bits. A mask that does not qualify, or equals no known pattern, has no meaning and stays dense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.graph import is_call

aten = torch.ops.aten
LARGEST_CONSTANT = 4096
_SHAPE_OPS = frozenset(
    {
        aten.unsqueeze.default,
        aten.reshape.default,
        aten.view.default,
        aten.expand.default,
        aten.transpose.int,
        aten.permute.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
        aten.slice.Tensor,
        aten.sym_size.int,
        aten.squeeze.dim,
    }
)
_INDEX_OPS = frozenset(
    {
        aten.arange.default,
        aten.arange.start,
        aten.arange.start_step,
        aten.add.Tensor,
        aten.add.Scalar,
        aten.sub.Tensor,
        aten.sub.Scalar,
        aten.le.Tensor,
        aten.le.Scalar,
        aten.lt.Tensor,
        aten.lt.Scalar,
        aten.ge.Tensor,
        aten.ge.Scalar,
        aten.gt.Tensor,
        aten.gt.Scalar,
        aten.eq.Scalar,
        aten.ne.Scalar,
        aten.logical_and.default,
        aten.logical_or.default,
        aten.logical_not.default,
        aten.bitwise_and.Tensor,
        aten.bitwise_or.Tensor,
        aten.bitwise_not.default,
        aten.__and__.Tensor,
        aten.__or__.Tensor,
        aten.tril.default,
        aten.triu.default,
        aten.ones.default,
        aten.zeros.default,
        aten.full.default,
        aten.ones_like.default,
        aten.zeros_like.default,
        aten.full_like.default,
        aten.new_ones.default,
        aten.new_zeros.default,
        aten.new_full.default,
        aten.scalar_tensor.default,
        aten.where.self,
        aten.where.ScalarOther,
        aten.where.ScalarSelf,
        aten.where.Scalar,
        aten.masked_fill.Scalar,
        aten.to.dtype,
        aten._to_copy.default,
    }
)


@dataclass(frozen=True, slots=True)
class MaskMeaning:
    """A proven mask. padding: the 2-D input it is combined with, None without one."""

    causal: bool
    window: int
    padding: fx.Node | None


def read_mask(mask: fx.Node, is_visible: Callable[[Tensor], Tensor]) -> MaskMeaning | None:
    """The meaning of a mask node, None when it cannot be proven.

    is_visible: turns the mask's values into booleans (identity for boolean masks; for additive
    ones, which values count as hidden).
    """
    found = _collect(mask)
    if found is None:
        return None
    nodes, padding, limit = found
    sizes = (2 * limit + 3, 2 * limit + 8, 5)
    candidates = None
    for size in sizes:
        bits = torch.rand(2, size) < 0.7
        bits[:, 0] = True
        try:
            values = _evaluate(nodes, mask, size, bits)
        except (RuntimeError, KeyError, TypeError):
            return None
        visible = is_visible(values)
        if visible.ndim < 2 or any(axis not in (1, size) for axis in visible.shape[-2:]):
            return None
        visible = visible.expand(*visible.shape[:-2], size, size)
        matches = {m for m in _patterns(limit, padding) if _equals(m, visible, bits)}
        candidates = matches if candidates is None else candidates & matches
    if not candidates:
        return None
    # The smallest window that explains a mask is the stated one; no window is preferred to a
    # window that no tested size reaches.
    return min(candidates, key=lambda m: (m.window != 0, m.window))


def _collect(mask: fx.Node) -> tuple[list[fx.Node], fx.Node | None, int] | None:
    """(subgraph in order, padding input, sum of integer constants), None if it does not qualify."""
    seen: set[fx.Node] = set()
    padding: fx.Node | None = None
    limit = 1
    stack = [mask]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        value = node.meta.get("val")
        if node.op == "placeholder":
            is_size_source = all(is_call(u, aten.sym_size.int) for u in node.users if u in seen)
            if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point():
                if not is_size_source:
                    if padding not in (None, node):
                        return None
                    padding = node
                continue
            return None
        if is_call(node, aten.sym_size.int):
            continue
        if not is_call(node, *_SHAPE_OPS, *_INDEX_OPS):
            return None
        if node.target in _INDEX_OPS:
            for constant in node.args:
                if isinstance(constant, int) and not isinstance(constant, bool):
                    limit += abs(constant)
        stack.extend(node.all_input_nodes)
    if limit > LARGEST_CONSTANT:
        return None
    return [n for n in mask.graph.nodes if n in seen], padding, limit


def _evaluate(nodes: list[fx.Node], mask: fx.Node, size: int, bits: Tensor) -> Tensor:
    values: dict[fx.Node, Any] = {}
    for node in nodes:
        if node.op == "placeholder":
            values[node] = bits.to(node.meta["val"].dtype)
        elif is_call(node, aten.sym_size.int):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            # Axis 0 of an input is the batch, any other symbolic size the sequence.
            values[node] = 2 if source.op == "placeholder" and node.args[1] == 0 else size
        else:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            assert callable(node.target)
            values[node] = node.target(*args, **kwargs)
    result = values[mask]
    assert isinstance(result, Tensor)
    return result


def _patterns(limit: int, padding: fx.Node | None) -> list[MaskMeaning]:
    windows = [0, *range(1, limit + 2)]
    patterns = [MaskMeaning(True, window, None) for window in windows]
    patterns.append(MaskMeaning(False, 0, None))
    if padding is not None:
        patterns = [MaskMeaning(m.causal, m.window, padding) for m in patterns]
    return patterns


def _equals(meaning: MaskMeaning, visible: Tensor, bits: Tensor) -> bool:
    size = visible.shape[-1]
    q, k = torch.arange(size)[:, None], torch.arange(size)[None, :]
    expected = k <= q if meaning.causal else torch.ones((size, size), dtype=torch.bool)
    if meaning.window:
        expected = expected & (k > q - meaning.window)
    if meaning.padding is not None:
        expected = expected & bits[:, None, None, :]
    try:
        return bool((visible == expected).all())
    except RuntimeError:
        return False
