"""Every address that a native step can form lies inside its operand's buffer, whatever the batch.

A step walks an operand along some of its dims, with a stride for each. For every operand the
furthest element is compared with the size of its buffer, both linear in one count of rows, so a
plan that would read or write elsewhere is refused when it is made, not noticed when it runs. That
makes graphs from files safe, too: their types are checked, but ops of ours do not look at every
operand's shape.

What data say (token ids, slots, block tables, rows that are picked) is bounded by the kernels and,
once a step, by `native/step.cpp`. Weights in kernel layouts are checked by shape as they are
lowered (`rules_weights.py`), caches as they are bound (`executable.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graphopt.codegen.cpu.abi import Op, Sym
from graphopt.codegen.cpu.plan_steps import External, NativeStep, Temporary
from graphopt.codegen.cpu.views import Extent, View
from graphopt.errors import BackendError

Walk = list[tuple[Extent, int]]
"""(extent, stride in elements) of every axis that a step walks an operand along."""


def check_bounds(step: NativeStep, buffers: Sequence[Temporary | External]) -> None:
    """Raise BackendError when `step` could leave one of its operands' buffers."""
    walks = _WALKS[step.op](step)
    for number, (view, walk) in enumerate(zip(step.operands, walks, strict=False)):
        if view is None or walk is None:
            continue
        if not _fits(view, walk, buffers[view.buffer]):
            raise BackendError(
                f"{step.op.name} of {step.value} would leave operand {number}: the shapes of its "
                "operands do not go together"
            )


def _fits(view: View, walk: Walk, buffer: Temporary | External) -> bool:
    size, sym = _size(buffer)
    if any(extent.mult == 0 for extent, _ in walk):
        return True
    if view.offset < 0 or any(stride < 0 for _, stride in walk):
        return False
    moving = [(extent, stride) for extent, stride in walk if stride and not extent.is_one]
    symbols = {extent.sym for extent, _ in moving} - {Sym.SYM_ONE}
    # The furthest element is at fixed + growing * symbol.
    growing = sum(e.mult * stride for e, stride in moving if e.sym is not Sym.SYM_ONE)
    fixed = -sum(stride for _, stride in moving)
    fixed += sum(e.mult * stride for e, stride in moving if e.sym is Sym.SYM_ONE)
    end = view.offset + (fixed + 1) * view.dtype.itemsize
    slope = growing * view.dtype.itemsize
    if not symbols:
        # A symbol is at least 1.
        return end <= size
    # With one row it must fit, and further rows must not need more than the buffer grows.
    return sym is not Sym.SYM_ONE and symbols <= _BELOW[sym] and slope <= size >= end + slope


# Rows of logits are rows of the step, each at most once (native/step.cpp).
_BELOW: dict[Sym, set[Sym]] = {
    Sym.SYM_TOKENS: {Sym.SYM_TOKENS, Sym.SYM_LOGIT_ROWS},
    Sym.SYM_LOGIT_ROWS: {Sym.SYM_LOGIT_ROWS},
}


def _size(buffer: Temporary | External) -> tuple[int, Sym]:
    """Bytes, and of what symbol they are a multiple."""
    if isinstance(buffer, External):
        assert buffer.size is not None, buffer.name
        return buffer.size.mult, buffer.size.sym
    if buffer.bytes_per_token:
        return buffer.bytes_per_token, Sym.SYM_TOKENS
    return buffer.fixed_bytes, Sym.SYM_ONE


def _rows(step: NativeStep, operand: int, *dims: int, last: Extent) -> Walk:
    """Along `dims` by the step's strides, then along `last` elements that lie side by side."""
    strides = step.strides[operand]
    walk = [(step.dims[dim], strides[i]) for i, dim in enumerate(dims)]
    return [*walk, (last, 1)]


def _embed(step: NativeStep) -> list[Walk | None]:
    rows, width = step.dims
    return [_rows(step, 0, 0, last=width), [(rows, 1)], None]


def _linear(step: NativeStep) -> list[Walk | None]:
    _, outputs, depth = step.dims
    out, x = _rows(step, 0, 0, last=outputs), _rows(step, 1, 0, last=depth)
    return [out, x, None, [(outputs, 1)]]


def _norm(step: NativeStep) -> list[Walk | None]:
    width = step.dims[2]
    walks = [_rows(step, operand, 0, 1, last=width) for operand in (0, 1)]
    return [*walks, [(width, 1)], [(width, 1)]]


def _rope(step: NativeStep) -> list[Walk | None]:
    width, rotary = step.dims[2:]
    if rotary.mult > width.mult or rotary.mult % 2:
        raise BackendError(
            f"OP_ROPE of {step.value} turns {rotary.mult} columns of heads with {width.mult}"
        )
    angles = Extent(rotary.mult // (2 if step.attrs_i[1] else 1))
    heads = [_rows(step, operand, 0, 1, last=width) for operand in (0, 1)]
    return [*heads, *(_rows(step, operand, 0, last=angles) for operand in (2, 3))]


def _kv_write(step: NativeStep) -> list[Walk | None]:
    _of_the_step(step)
    rows, _, key, value = step.dims
    walks = [_rows(step, 2, 0, 1, last=key), _rows(step, 3, 0, 1, last=value)]
    return [None, None, *walks, [(rows, 1)]]


def _attention(step: NativeStep) -> list[Walk | None]:
    _of_the_step(step)
    rows, kv_heads, key, value = step.dims
    heads = Extent(kv_heads.mult * step.attrs_i[1])
    walks = [
        [(rows, step.strides[i][0]), (heads, step.strides[i][1]), (width, 1)]
        for i, width in ((0, value), (1, key))
    ]
    return [*walks, None, None, None, None, None, [(heads, 1)]]


def _of_the_step(step: NativeStep) -> None:
    """Step inputs name as many rows as there are tokens."""
    if step.dims[0] != Extent(1, Sym.SYM_TOKENS):
        raise BackendError(
            f"{step.op.name} of {step.value} does not take exactly the token rows of the step"
        )


def _glu(step: NativeStep) -> list[Walk | None]:
    return [_rows(step, operand, 0, last=step.dims[1]) for operand in (0, 1, 2)]


def _elementwise(step: NativeStep) -> list[Walk | None]:
    return [list(zip(step.dims, strides, strict=True)) for strides in step.strides]


def _gather(step: NativeStep) -> list[Walk | None]:
    rows, width, table = step.dims
    out, x = _rows(step, 0, 0, last=width), [(table, step.strides[1][0]), (width, 1)]
    return [out, x, [(rows, 1)]]


_WALKS: dict[Op, Callable[[NativeStep], list[Walk | None]]] = {
    Op.OP_EMBED: _embed,
    Op.OP_LINEAR: _linear,
    Op.OP_RMS_NORM: _norm,
    Op.OP_LAYER_NORM: _norm,
    Op.OP_ROPE: _rope,
    Op.OP_KV_WRITE: _kv_write,
    Op.OP_PAGED_ATTENTION: _attention,
    Op.OP_GLU: _glu,
    Op.OP_BINARY: _elementwise,
    Op.OP_UNARY: _elementwise,
    Op.OP_GATHER_ROWS: _gather,
}
