"""Lowering of a serving graph to a CPU plan: one rule an op, torch for the ops without one.

Shape ops become views and cost nothing. An op whose rule does not apply to its operands (integer
arithmetic, an unusual layout) becomes a host step: torch runs it on views of the arena between two
native segments, so every graph runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graphopt.codegen.cpu.abi import Op, Sym
from graphopt.codegen.cpu.dtypes import FLOATS, NATIVE_DTYPES
from graphopt.codegen.cpu.plan import Plan, PlanBuilder
from graphopt.codegen.cpu.plan_steps import HostStep, NativeStep
from graphopt.codegen.cpu.views import Extent, View, row_major, total
from graphopt.codegen.reference import as_defined
from graphopt.errors import BackendError
from graphopt.ir.graph import Graph, op_name, where
from graphopt.ir.opset import is_impure
from graphopt.ir.step import BLOCK_COLUMNS, LOGIT_ROWS, REQUESTS, ROWS, STEP

SYMBOLS = {
    ROWS: Sym.SYM_TOKENS,
    REQUESTS: Sym.SYM_REQUESTS,
    LOGIT_ROWS: Sym.SYM_LOGIT_ROWS,
    BLOCK_COLUMNS: Sym.SYM_BLOCK_COLUMNS,
}
LOGITS = "logits"

Rule = Callable[["Lowering", fx.Node], bool]
"""Lowers one call; returns False when it does not apply to these operands."""


class Lowering:
    """State of one lowering: the view of every node, and the plan so far.

    rules: op -> lowering rule. parts: the views of a split. matrices: weights read in a kernel
    layout; vectors: weights read as plain tensors.
    """

    def __init__(self, graph: Graph, rules: Mapping[object, Rule]) -> None:
        self.graph, self._rules = graph, rules
        self.plan = PlanBuilder()
        self.views: dict[fx.Node, View] = {}
        self._opaque_views: dict[fx.Node, View] = {}
        self.parts: dict[fx.Node, list[View]] = {}
        self.matrices: dict[str, str] = {}
        self.vectors: dict[str, torch.dtype] = {}
        # Read by kernels that know their shape; nothing else may touch them.
        self._opaque = {spec.name for spec in graph.inputs if spec.kind == "cache"}
        self._opaque |= {step.name for step in STEP if not step.is_per_row}
        self._symbols = {text: SYMBOLS.get(name) for text, name in graph.symbols.items()}

    def run(self) -> Plan:
        """Lower every node."""
        (logits,) = self.graph.output_nodes
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self._input(node)
            elif node.op == "call_function":
                self._call(node)
        self._result(logits)
        return self.plan.finish()

    def _input(self, node: fx.Node) -> None:
        value = node.meta["val"]
        if node.target in self._opaque:
            buffer = self.plan.external(str(node.target))
            self._opaque_views[node] = View(buffer, value.dtype, (), ())
            return
        axes = next((step.axes for step in STEP if step.name == node.target), ())
        extents = tuple(Extent(1, SYMBOLS[axis]) for axis in axes)
        if not axes or self.extents(node) != extents or value.dtype != torch.int64:
            raise BackendError(
                f"input %{node.target} : {value.dtype} {list(value.shape)} is none of a step's"
            )
        self.views[node] = self._external(str(node.target), extents, value.dtype)

    def _external(self, name: str, extents: tuple[Extent, ...], dtype: torch.dtype) -> View:
        """Memory of somebody else that holds dense `extents`."""
        buffer = self.plan.external(name, total(extents, dtype.itemsize))
        return View(buffer, dtype, extents, row_major(extents))

    def _call(self, node: fx.Node) -> None:
        value = node.meta["val"]
        if not isinstance(value, (Tensor, list, tuple)) and not is_impure(node.target):
            return
        self.plan.value = f"%{node.meta['number']}"
        apply = self._rules.get(node.target)
        try:
            if apply is None or not apply(self, node):
                self._host(node)
        # A rule reads numbers and shapes off a graph that may come from a file.
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise BackendError(f"{where(node)} cannot be lowered: {error}") from error

    def _result(self, node: fx.Node) -> None:
        view = self.view(node)
        self.plan.value = "return"
        width = node.meta["val"].shape[-1] * view.dtype.itemsize
        buffer = self.plan.external(LOGITS, Extent(width, Sym.SYM_LOGIT_ROWS))
        self.copy(view, View(buffer, view.dtype, view.extents, row_major(view.extents)))

    def opaque(self, node: Any) -> View:
        """A cache, or an input that tells where in it: no array to a plan, a place for the kernels
        that are made for it."""
        if node not in self._opaque_views:
            raise BackendError(f"%{node} is no cache and no input about one")
        return self._opaque_views[node]

    def extent(self, size: Any, node: fx.Node) -> Extent:
        """A size as `mult * symbol`."""
        if isinstance(size, int):
            return Extent(size)
        expr = size.node.expr
        mult, symbols = expr.as_coeff_Mul()
        sym = self._symbols.get(str(symbols))
        if isinstance(symbols, sympy.Symbol) and sym is not None and mult.is_Integer:
            return Extent(int(mult), sym)
        raise BackendError(f"size {expr} of {where(node)} is not a multiple of one row count")

    def extents(self, node: fx.Node) -> tuple[Extent, ...]:
        """Shape of a node."""
        return tuple(self.extent(size, node) for size in node.meta["val"].shape)

    def view(self, node: Any) -> View:
        """Where an operand lies; a weight becomes an external on first use.

        Raises BackendError for what only `opaque` gives.
        """
        if node in self._opaque_views:
            raise BackendError(f"%{node.target} is read by an op that is not made for it")
        if node not in self.views:
            if not isinstance(node, fx.Node):
                raise BackendError(f"{node!r} is no tensor that the cpu backend could read")
            if node.op != "get_attr":
                raise BackendError(f"{where(node)} is no tensor that the cpu backend could read")
            name = str(node.target)
            value = node.meta["val"]
            extents = tuple(Extent(int(s)) for s in value.shape)
            self.vectors[name] = value.dtype
            self.views[node] = self._external(f"tensor:{name}", extents, value.dtype)
        return self.views[node]

    def allocate(self, extents: Sequence[Extent], dtype: torch.dtype) -> View:
        """A new temporary; `[1, H, T, D]` is laid out as `[T, H, D]`."""
        buffer = self.plan.temporary(extents, dtype.itemsize)
        return View(buffer, dtype, tuple(extents), row_major(extents))

    def output(self, node: fx.Node) -> View:
        """A new temporary for the result of `node`."""
        view = self.allocate(self.extents(node), node.meta["val"].dtype)
        self.views[node] = view
        return view

    def add(
        self,
        op: Op,
        operands: Sequence[View | None],
        dims: Sequence[Extent],
        strides: Sequence[Sequence[int]],
        attrs_i: Sequence[int] = (),
        attrs_f: Sequence[float] = (),
        writes: int = 1,
    ) -> None:
        """Append a native step."""
        step = NativeStep(
            op,
            tuple(operands),
            tuple(dims),
            tuple(tuple(s) for s in strides),
            tuple(attrs_i),
            tuple(attrs_f),
            writes,
            self.plan.value,
        )
        self.plan.steps.append(step)

    def copy(self, source: View, target: View) -> None:
        """Element-wise copy or cast between views of one shape; torch's for dtypes without a kernel
        (float64, complex)."""
        if all(view.dtype in NATIVE_DTYPES for view in (source, target)):
            elementwise(self, Op.OP_UNARY, [target, source], (0,))
            return

        def run(tensor: Callable[[View | Extent], Any]) -> None:
            tensor(target).copy_(tensor(source))

        text = f"copy of {source.dtype} ({self.plan.value})"
        self.plan.steps.append(HostStep(run, (target, source), text, "aten.copy", self.plan.value))

    def dense(self, view: View) -> View:
        """`view` itself when it is dense with rows slowest, else a dense copy."""
        if view.strides == row_major(view.extents):
            return view
        made = self.allocate(view.extents, view.dtype)
        self.copy(view, made)
        return made

    def rows_by_width(self, view: View) -> tuple[Extent, int, int] | None:
        """(rows, row stride, width) with all axes but the symbolic (or first) one in the width;
        None when they are not dense."""
        axes = view.axes()
        if not axes:
            return Extent(1), 1, 1
        symbolic = [i for i, (e, _) in enumerate(axes) if e.sym is not Sym.SYM_ONE]
        if not symbolic:
            axes = [(Extent(1), 0), *axes]
            symbolic = [0]
        (row,) = symbolic
        rest = axes[:row] + axes[row + 1 :]
        expected = 1
        for extent, stride in reversed(rest):
            if stride != expected:
                return None
            expected *= extent.mult
        return axes[row][0], axes[row][1], expected

    def rows_heads_width(self, view: View) -> tuple[Extent, Extent, int, int, int] | None:
        """(rows, heads, width, row stride, head stride): at most one plain axis beside the last."""
        last_extent, last_stride = view.extents[-1], view.strides[-1]
        if last_extent.sym is not Sym.SYM_ONE or (last_stride != 1 and not last_extent.is_one):
            return None
        rows, heads = (Extent(1), 0), (Extent(1), 0)
        leading = list(zip(view.extents, view.strides, strict=True))[:-1]
        for extent, stride in leading:
            if extent.is_one:
                continue
            if extent.sym is not Sym.SYM_ONE and rows[0].is_one:
                rows = (extent, stride)
            elif extent.sym is Sym.SYM_ONE and heads[0].is_one:
                heads = (extent, stride)
            else:
                return None
        return rows[0], heads[0], last_extent.mult, rows[1], heads[1]

    def _host(self, node: fx.Node) -> None:
        host_step(self, node)


def elementwise(
    lowering: Lowering,
    op: Op,
    views: Sequence[View],
    attrs_i: Sequence[int],
    attrs_f: Sequence[float] = (),
) -> None:
    """Append a step over at most four axes; neighbouring axes that step alike are merged."""
    target = views[0]
    expanded = [v.expanded(target.extents) for v in views]
    axes: list[tuple[Extent, list[int]]] = []
    for i, extent in enumerate(target.extents):
        if extent.is_one:
            continue
        steps = [v.strides[i] for v in expanded]
        if axes and extent.sym is Sym.SYM_ONE:
            outer, outer_steps = axes[-1]
            if all(o == s * extent.mult for o, s in zip(outer_steps, steps, strict=True)):
                axes[-1] = (Extent(outer.mult * extent.mult, outer.sym), steps)
                continue
        axes.append((extent, steps))
    if len(axes) > 4:
        raise BackendError(f"an element-wise step over {len(axes)} axes; at most 4 are supported")
    axes = [(Extent(1), [0] * len(views))] * (4 - len(axes)) + axes
    strides = [[steps[j] for _, steps in axes] for j in range(len(views))]
    lowering.add(op, views, [e for e, _ in axes], strides, attrs_i, attrs_f)


def host_step(lowering: Lowering, node: fx.Node) -> None:
    """Run `node` with torch: its tensor operands are views of the plan's memory."""
    inputs = [n for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)]
    sizes = [n for n in node.all_input_nodes if not isinstance(n.meta["val"], Tensor)]
    if is_impure(node.target) or not isinstance(node.meta["val"], Tensor):
        raise BackendError(f"the cpu backend has no way to run {where(node)}")
    views = {n: lowering.view(n) for n in inputs}
    extents = {n: lowering.extent(n.meta["val"], n) for n in sizes}
    out = lowering.output(node)
    target, args, kwargs, text = node.target, node.args, node.kwargs, where(node)

    def run(tensor: Callable[[View | Extent], Any]) -> None:
        def value(n: fx.Node) -> Any:
            return tensor(views[n]) if n in views else tensor(extents[n])

        assert callable(target)
        with as_defined(text):
            result = target(*fx.node.map_arg(args, value), **fx.node.map_arg(kwargs, value))
            tensor(out).copy_(result)

    views_used = (out, *views.values())
    step = HostStep(run, views_used, text, op_name(node), lowering.plan.value)
    lowering.plan.steps.append(step)


def tensor_floats(*views: View) -> bool:
    """True when every view holds floats a kernel takes."""
    return all(v.dtype in FLOATS for v in views)


def is_vector(view: View, size: int) -> bool:
    """True for `size` floats, one after the other."""
    is_dense = view.strides == row_major(view.extents)
    return view.extents == (Extent(size),) and is_dense and tensor_floats(view)


def scalar(value: Any) -> float | None:
    """A Python number as float; None for nodes and anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
