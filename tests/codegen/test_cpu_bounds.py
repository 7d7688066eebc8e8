"""No plan is made whose instructions could leave their operands, whatever the graph says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.serving_steps import Steps
from kernel_cases import CASES, INDEX, OPS, PACKED, KernelCase
from serving_graph import VOCABULARY, ServingGraph
from torch import fx

from graphopt.codegen.cpu.abi import Op, Sym
from graphopt.codegen.cpu.backend import CpuBackend
from graphopt.codegen.cpu.bounds import check_bounds
from graphopt.codegen.cpu.build import load_library
from graphopt.codegen.cpu.executable import CpuServing
from graphopt.codegen.cpu.plan_steps import External, NativeStep, Temporary
from graphopt.codegen.cpu.views import Extent, View
from graphopt.codegen.reference import ReferenceServing
from graphopt.errors import BackendError, VerifyError
from graphopt.ops import kv_write, linear_wq, paged_attention, rope, swiglu

aten = torch.ops.aten
CACHES = {(Op.OP_KV_WRITE, 0), (Op.OP_KV_WRITE, 1), (Op.OP_PAGED_ATTENTION, 2)}
CACHES |= {(Op.OP_PAGED_ATTENTION, operand) for operand in (3, 4, 5, 6)}
"""Their sizes are not known to a plan."""
ROWS = 3
SIZED = [
    (op, operand)
    for op in OPS
    for operand, takes in enumerate(CASES[op]().takes)
    if takes != PACKED and (op, operand) not in CACHES
]


def step_of(case: KernelCase) -> tuple[NativeStep, list[Temporary | External]]:
    """The case over any number of rows, each operand in a buffer that just holds it."""
    views: list[View | None] = []
    buffers: list[Temporary | External] = []
    for number, tensor in enumerate(case.operands):
        assert tensor is not None
        size = Extent(tensor.numel() * tensor.element_size())
        if len(tensor) == ROWS:
            size = Extent(size.mult // ROWS, Sym.SYM_TOKENS)
        is_known = case.takes[number] != PACKED and (case.op, number) not in CACHES
        buffers.append(External(f"operand {number}", size if is_known else None))
        views.append(View(number, tensor.dtype, (), ()))
    dims = [Extent(1, Sym.SYM_TOKENS) if dim == ROWS else Extent(dim) for dim in case.dims]
    strides = tuple(tuple(row) for row in case.strides)
    attributes = tuple(case.attrs_i)
    return NativeStep(case.op, tuple(views), tuple(dims), strides, attributes), buffers


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_operands_that_just_fit(op: Op) -> None:
    check_bounds(*step_of(CASES[op]()))


@pytest.mark.parametrize(("op", "operand"), SIZED, ids=str)
def test_operands_that_are_too_small(op: Op, operand: int) -> None:
    step, buffers = step_of(CASES[op]())
    size = buffers[operand].size  # type: ignore[union-attr]
    assert size is not None
    buffers[operand] = External("short", Extent(size.mult - 1, size.sym))
    with pytest.raises(BackendError, match=rf"{op.name}.* would leave operand {operand}"):
        check_bounds(step, buffers)


@pytest.mark.parametrize(("op", "operand"), SIZED, ids=str)
@pytest.mark.parametrize("offset", [8, -8])
def test_views_that_begin_elsewhere(op: Op, operand: int, offset: int) -> None:
    step, buffers = step_of(CASES[op]())
    view = step.operands[operand]
    assert view is not None
    moved = View(view.buffer, view.dtype, (), (), offset)
    operands = (*step.operands[:operand], moved, *step.operands[operand + 1 :])
    with pytest.raises(BackendError, match=f"would leave operand {operand}"):
        check_bounds(NativeStep(step.op, operands, step.dims, step.strides, step.attrs_i), buffers)


@pytest.mark.parametrize(
    ("sym", "buffer"),
    [
        (Sym.SYM_REQUESTS, External("x", Extent(32, Sym.SYM_TOKENS))),
        (Sym.SYM_TOKENS, External("x", Extent(32, Sym.SYM_LOGIT_ROWS))),
        (Sym.SYM_TOKENS, Temporary(10**6, 0)),
    ],
)
def test_rows_of_another_kind(sym: Sym, buffer: Temporary | External) -> None:
    step, buffers = step_of(CASES[Op.OP_GLU]())
    buffers[1] = buffer
    dims = (Extent(1, sym), step.dims[1])
    with pytest.raises(BackendError, match="would leave operand"):
        check_bounds(NativeStep(step.op, step.operands, dims, step.strides, (0,)), buffers)


def test_rows_of_logits_are_rows() -> None:
    step, buffers = step_of(CASES[Op.OP_GLU]())
    dims = (Extent(1, Sym.SYM_LOGIT_ROWS), step.dims[1])
    check_bounds(NativeStep(step.op, step.operands, dims, step.strides, (0,)), buffers)


def narrow_gate(c: ServingGraph) -> fx.Node:
    return c.emit(swiglu.SPEC.overload, c.x(48), c.x(5))


def wide_tables(c: ServingGraph) -> fx.Node:
    tables = [c.emit(aten.unsqueeze.default, c.weight(torch.randn(1, 64)), 0) for _ in range(2)]
    return c.merge_heads(c.emit(rope.SPEC.overload, c.split_heads(4, 12), *tables))


def narrow_rows_of_low_bit(c: ServingGraph) -> fx.Node:
    codes = c.weight(torch.zeros((8, 512), dtype=torch.uint8), "w.codes")
    scale = c.weight(torch.zeros((8, 32), dtype=torch.float16), "w.scale")
    settings = {"bits": 4, "group": 32, "offset": 8, "activation": "float"}
    return c.emit(linear_wq.SPEC.overload, c.x(32), codes, scale, **settings)


def keys_of_other_rows(c: ServingGraph) -> fx.Node:
    heads = c.split_heads(2, 16)
    picked = c.emit(aten.index_select.default, heads, 2, c.inputs["logit_rows"])
    caches = [c.inputs["k_cache_0"], c.inputs["v_cache_0"]]
    c.emit(kv_write.SPEC.overload, *caches, picked, picked, c.inputs["slots"])
    return c.x()


def queries_of_other_rows(c: ServingGraph) -> fx.Node:
    heads = c.split_heads(4, 16)
    picked = c.emit(aten.index_select.default, heads, 2, c.inputs["logit_rows"])
    names = ("k_cache_0", "v_cache_0", "block_tables", "query_start", "kv_lens")
    attended = c.emit(
        paged_attention.SPEC.overload, picked, *(c.inputs[n] for n in names), scale=1.0
    )
    summed = c.emit(aten.select.int, c.emit(aten.select.int, attended, 0, 0), 0, 1)
    return c.emit(aten.unsqueeze.default, summed, 0)


def another_ops_cache(c: ServingGraph) -> fx.Node:
    first = c.emit(aten.select.int, c.emit(aten.select.int, c.inputs["k_cache_0"], 0, 0), 0, 0)
    return c.emit(aten.add.Tensor, c.x(16), c.emit(aten.select.int, first, 0, 0))


@pytest.mark.parametrize("build", [narrow_gate, wide_tables, narrow_rows_of_low_bit])
def test_operands_that_an_op_itself_refuses(build: Callable[[ServingGraph], fx.Node]) -> None:
    with pytest.raises(ValueError, match=r"must be|cannot be turned"):
        build(ServingGraph())


@pytest.mark.parametrize("build", [keys_of_other_rows, another_ops_cache])
def test_graphs_whose_operands_do_not_go_together(
    build: Callable[[ServingGraph], fx.Node],
) -> None:
    """Their types check; only torch can say what they mean, if anything."""
    case = ServingGraph()
    graph = case.finish(build(case))
    notes: list[str] = []
    lowered = CpuBackend(load_library(), 1, notes.append).lower_serving(graph, None, None)
    if isinstance(lowered, CpuServing):
        assert lowered.plan.host_steps, "no kernel may read this"
    else:
        assert len(notes) == 1


def test_attention_takes_all_rows_of_a_step() -> None:
    case = ServingGraph()
    node = queries_of_other_rows(case)
    case._output.args = ((case.emit(aten.squeeze.dim, node, 0),),)
    notes: list[str] = []
    lowered = CpuBackend(load_library(), 1, notes.append).lower_serving(case.graph, None, None)
    assert isinstance(lowered, ReferenceServing)
    assert "token rows of the step" in notes[0]


def test_logits_of_every_row_do_not_fit() -> None:
    case = ServingGraph()
    case._output.args = ((case.emit(aten.squeeze.dim, case.x(), 0),),)
    with pytest.raises(VerifyError, match="returns logits"):
        CpuBackend(load_library(), 1).lower_serving(case.graph, None, None)


def over_blocks(c: ServingGraph) -> fx.Node:
    columns = c.emit(aten.sym_size.int, c.inputs["block_tables"], 1)
    return c.emit(aten.zeros.default, [1, columns, 4])


def test_buffers_grow_with_rows_only() -> None:
    case = ServingGraph()
    sums = case.emit(aten.sum.dim_IntList, over_blocks(case), [1], True)
    graph = case.finish(case.emit(aten.add.Tensor, case.x(4), sums))
    notes: list[str] = []
    lowered = CpuBackend(load_library(), 1, notes.append).lower_serving(graph, None, None)
    assert isinstance(lowered, ReferenceServing)
    assert "grows with the number of requests or blocks" in notes[0]


def by_token(op: str) -> Callable[[ServingGraph], fx.Node]:
    """Ops that look rows of a table with 5 rows up, or write them, by token id."""

    def build(c: ServingGraph) -> fx.Node:
        table, ids = c.weight(torch.randn(5, 8)), c.inputs["tokens"]
        column = c.emit(aten.unsqueeze.default, ids, 1)
        match op:
            case "embedding":
                found = c.emit(aten.embedding.default, table, ids)
            case "index_select":
                found = c.emit(aten.index_select.default, table, 0, ids)
            case "index":
                found = c.emit(aten.index.Tensor, table, [ids])
            case "gather":
                wide = c.emit(aten.expand.default, column, [c.rows(), 8])
                found = c.emit(aten.gather.default, table, 0, wide)
            case "take":
                found = c.emit(
                    aten.expand.default, c.emit(aten.take.default, table, column), [-1, 8]
                )
            case "scatter":
                rows = c.emit(aten.squeeze.dim, c.x(8), 0)
                found = c.emit(aten.scatter.value, rows, 1, column, 1.0)
            case _:
                rows = c.emit(aten.squeeze.dim, c.x(8), 0)
                values = c.emit(aten.squeeze.dim, c.x(8), 0)
                found = c.emit(aten.index_put.default, rows, [ids], values)
        return c.emit(aten.unsqueeze.default, found, 0)

    return build


LOOKUPS = ("embedding", "index_select", "index", "gather", "take", "scatter", "index_put")


@pytest.mark.parametrize("op", LOOKUPS)
def test_ops_that_look_rows_up_refuse_those_that_are_not_there(op: str) -> None:
    case = ServingGraph()
    graph = case.finish(by_token(op)(case))
    lowered = CpuBackend(load_library(), 2).lower_serving(graph, None, None)
    assert isinstance(lowered, CpuServing)
    good = Steps(lowered, [[0, 1, 4, 3, 2]]).run([5])
    assert good[0].isfinite().all()
    for wrong in ([0, VOCABULARY - 1, 3], [41], [1, 2, 90, 4, 1, 1]):
        with pytest.raises(BackendError, match=r"out of (range|bounds)|cannot be computed"):
            Steps(lowered, [wrong]).run([len(wrong)])


def test_ids_that_lie_apart_are_read_where_they_are() -> None:
    """A kernel that took them for neighbours would read other ids, and leave their buffer."""
    case = ServingGraph()
    tokens = case.emit(aten.unsqueeze.default, case.inputs["tokens"], 1)
    pairs = case.emit(aten.cat.default, [tokens, case.emit(aten.neg.default, tokens)], 1)
    apart = case.emit(aten.slice.Tensor, pairs, 1, 0, 1)
    ids = case.emit(aten.reshape.default, apart, [1, case.rows()])
    table = torch.randn(VOCABULARY, 8)
    found = case.emit(aten.embedding.default, case.weight(table), ids)
    graph = case.finish(found)
    lowered = CpuBackend(load_library(), 2).lower_serving(graph, None, None)
    assert isinstance(lowered, CpuServing)
    prompt = torch.randint(0, VOCABULARY, (9,))
    (rows,) = Steps(lowered, [prompt.tolist()]).run([9])
    assert torch.equal(rows, table[prompt])


def test_index_operands_are_those_that_bounds_leave_to_the_data() -> None:
    indices = {(op, i) for op in OPS for i, t in enumerate(CASES[op]().takes) if t == INDEX}
    assert indices >= CACHES & indices
