"""insert_kv_cache: a plain forward (ids -> logits) becomes the serving graph.

    before   ids [B, S] -> ... attention(q, k, v, causal) ... -> logits [B, S, V]
    after    tokens [T], positions [T], slots [T], query_start [R+1], kv_lens [R],
             block_tables [R, M], logit_rows [L], k_cache_0, v_cache_0, ...
             ... kv_write(k_cache_i, v_cache_i, k, v, slots)
                 paged_attention(q, k_cache_i, v_cache_i, block_tables, query_start, kv_lens) ...
             -> logits [L, V]

The rows of all requests lie on one axis (batch 1, T rows); `positions` replace every iota over the
token axis; padding operands fall away, since a step has no padding. From the last attention on,
only the L rows whose logits are wanted are computed. A forward that returns the logits of the last
row only is served as well: each wanted row is the last of its prompt (`last_row.py`).

A constant cut to the length of the sequence (learned positions, rotary tables, position ids) is
read at `positions` instead.

Precondition, proven op by op (`trace_rows.py`): outside attention no op lets one token row see
another or one batch item another, and every attention is causal over the same rows. Otherwise the
pass is refused with the op and its source line. Never touches weights or anything the proof did not
cover.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphopt.ir.assumptions import Assumption
from graphopt.ir.builder import GraphBuilder
from graphopt.ir.graph import Graph, InputSpec, argument, graph_module, is_call, shape_of
from graphopt.ir.limits import Limit
from graphopt.ir.shapes import SymbolicInputs
from graphopt.ir.step import BLOCK_SIZE, BLOCKS, STEP
from graphopt.ops import attention, embedding_wq, kv_write, paged_attention
from graphopt.passes.analysis.rows.layout import Rows, RowsMixedError, Table
from graphopt.passes.analysis.rows.rules import CASTS, peak_bounds
from graphopt.passes.analysis.rows.trace_rows import trace_rows
from graphopt.passes.base import EXACT, Pass, Reject, Stage, Tier
from graphopt.passes.registry import register

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class ServingPlan:
    """What the proof found.

    rows: row axis of every node. tail: nodes needed only for the logits, after the last attention.
    """

    tokens: fx.Node
    logits: fx.Node
    rows: Rows
    tail: frozenset[fx.Node]


@register
class InsertKvCache(Pass[ServingPlan]):
    """See the module docstring."""

    name: ClassVar[str] = "insert_kv_cache"
    stage: ClassVar[Stage] = "cache"
    tier: ClassVar[Tier] = EXACT
    required: ClassVar[bool] = True

    def match(self, graph: Graph) -> Iterable[fx.Node]:
        """One candidate: the graph, stood for by its output."""
        return [graph.fx_graph.output_node()] if graph.dialect == "captured" else []

    def check(self, graph: Graph, node: fx.Node) -> ServingPlan | Reject:
        """Run the row-independence proof."""
        tokens = _token_input(graph)
        if tokens is None:
            return Reject("no-token-input", "no int64 [batch, sequence] input of token ids", node)
        names = [str(size) for size in shape_of(tokens)]
        if not all(name in graph.symbols for name in names) or names[0] == names[1]:
            return Reject(
                "static-sequence",
                "batch and sequence must be dynamic, each for itself",
                tokens,
                "capture with dynamic=True",
            )
        try:
            rows = trace_rows(graph, tokens)
        except RowsMixedError as refusal:
            return Reject(refusal.code, refusal.text, refusal.node)
        unserved = next(
            (limit for limit in graph.limits if not _is_servable(limit, graph, names)), None
        )
        if unserved is not None:
            return Reject(
                "limited-sizes",
                f"a request grows a token at a time and is a batch of one, and {unserved.reason()}",
                tokens,
                "write the model so that it takes any length and any batch",
            )
        outputs = graph.output_nodes
        logits = outputs[0]
        if len(outputs) != 1 or not _is_logits(rows, logits):
            return Reject(
                "no-logits",
                "the graph must return one [batch, sequence, vocabulary], or the logits of the "
                "last row",
                logits,
                "return the logits only",
            )
        ids, width = _table_rows(tokens), shape_of(logits)[-1]
        if ids is not None and isinstance(width, int) and 2 * width <= ids:
            return Reject(
                "no-logits",
                f"the graph returns {width} values for a row and takes {ids} token ids: a "
                "classifier, whose values are not logits of the next token",
                logits,
                "call the program; it has nothing to generate",
            )
        return ServingPlan(tokens, logits, rows, _tail(graph, rows))

    def rewrite(self, builder: GraphBuilder, bound: ServingPlan) -> None:
        """Rebuild the graph over token rows."""
        _Rebuild(builder.graph, bound, builder.site).run()


def _is_servable(limit: Limit, graph: Graph, sizes: Sequence[str]) -> bool:
    """A longest and a shortest request can be told to its sender."""
    return limit.size == graph.symbols[sizes[1]] and limit.relation in ("<=", ">=")


def _token_input(graph: Graph) -> fx.Node | None:
    for node in graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            if value.dtype == torch.int64 and value.ndim == 2 and node.name != "attention_mask":
                return node
    return None


def _is_logits(rows: Rows, node: fx.Node) -> bool:
    shape = shape_of(node)
    if rows.batch_of(node) != 0:
        return False
    if node in rows.picked:
        return len(shape) == 2 or (len(shape) == 3 and shape[1] == 1)
    return rows.of(node) == 1 and len(shape) == 3


def _table_rows(tokens: fx.Node) -> int | None:
    """Rows of the smallest table that the token ids are looked up in: ids are below it."""
    found: list[int] = []
    pending = [tokens]
    while pending:
        node = pending.pop()
        for user in node.users:
            if is_call(user, aten.embedding.default, embedding_wq.SPEC.overload):
                table = user.all_input_nodes[0]
                found += [int(shape_of(table)[0])] if table is not node else []
            elif is_call(user, *CASTS):
                pending.append(user)
    return min(found, default=None)


def _tail(graph: Graph, rows: Rows) -> frozenset[fx.Node]:
    """Row nodes made from row nodes, all of whose readers lead only to the output, back to the last
    attention."""
    tail: set[fx.Node] = set()
    output = graph.fx_graph.output_node()
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or node.target is attention.SPEC.overload:
            continue
        # Iotas, fills and tables are made for all rows; the tail picks from them.
        is_made_of_rows = any(rows.of(operand) is not None for operand in node.all_input_nodes)
        if rows.of(node) is None or not is_made_of_rows:
            continue
        if all(user is output or user in tail for user in node.users):
            tail.add(node)
    # A part of a split that other parts keep whole is picked from the part, not from the split.
    parts = {node for node in tail if node.target is operator.getitem}
    return frozenset(tail - {node for node in parts if node.args[0] not in tail})


class _Rebuild:
    """One rebuild of a captured graph into a serving graph, in place."""

    def __init__(self, graph: Graph, plan: ServingPlan, site: str) -> None:
        self.old, self.plan = graph, plan
        self.fake = SymbolicInputs()
        self.graph = Graph(
            graph.name,
            graph_module(fx.Graph()),
            (),
            graph.weights,
            graph.packed,
            dialect="serving",
            next_number=graph.next_number,
        )
        self.builder = GraphBuilder(self.graph, self.fake.mode)
        self.builder.site = site
        self.inputs: dict[str, fx.Node] = {}
        self.caches: list[InputSpec] = []
        self.assumed: list[Assumption] = []
        self.whole: dict[fx.Node, Any] = {}
        self.chosen: dict[fx.Node, Any] = {}
        self.picked: dict[fx.Node, Any] = {}

    def run(self) -> None:
        """Emit inputs, copy every node, and move the result into the old graph object."""
        for step in STEP:
            value = self.fake.tensor(step.axes, torch.int64)
            self.inputs[step.name] = self.builder.input(step.name, value)
        found = self.old.calls(attention.SPEC.overload)
        attentions = [node for node in found if self.plan.rows.of(node) is not None]
        caches = [self._cache_inputs(i, node) for i, node in enumerate(attentions)]
        like = [self.plan.tokens]
        tokens = self.builder.emit(aten.unsqueeze.default, [self.inputs["tokens"], 0], like=like)
        rows = self.builder.emit(aten.sym_size.int, [self.inputs["tokens"], 0], like=like)
        wanted = self.builder.emit(aten.sym_size.int, [self.inputs["logit_rows"], 0], like=like)
        self.whole[self.plan.tokens] = tokens
        pending = iter(caches)
        for node in self.old.nodes:
            if node.op == "get_attr":
                self.whole[node] = self.builder.weight(str(node.target), like=[node])
            elif node.op == "call_function" and self._is_kept(node):
                if node in attentions:
                    self.whole[node] = self._paged(node, *next(pending))
                elif isinstance(node.meta["val"], (torch.SymInt, int)):
                    self.whole[node] = self._size(node, self.whole.__getitem__, rows)
                    self.chosen[node] = self._size(node, self._rows_wanted, wanted)
                    is_batch = str(node.meta["val"]) == str(shape_of(self.plan.tokens)[0])
                    self.picked[node] = wanted if is_batch else self.whole[node]
                elif node in self.plan.rows.picked:
                    self.picked[node] = self._copy_picked(node)
                elif node in self.plan.tail:
                    self.chosen[node] = self._copy(node, self._rows_wanted)
                else:
                    self.whole[node] = self._copy(node, self.whole.__getitem__)
        flat = self._flat(self.plan.logits)
        output = self.graph.fx_graph.output((flat,))
        output.meta["val"] = None
        self.old.gm = self.graph.gm
        self.old.inputs = (*(InputSpec(step.name) for step in STEP), *self.caches)
        self.old.symbols = self.fake.names
        self.old.next_number = self.graph.next_number
        self.old.dialect = "serving"
        # Those of the forward are of inputs that a step has not.
        self.old.assumptions = tuple(self.assumed)

    def _flat(self, logits: fx.Node) -> fx.Node:
        """The logits as `[L, V]`."""
        is_picked = logits in self.picked
        value: fx.Node = self.picked[logits] if is_picked else self._rows_wanted(logits)
        if is_picked and len(shape_of(logits)) == 2:
            return value
        return self.builder.emit(aten.select.int, [value, int(is_picked), 0], like=[logits])

    def _is_kept(self, node: fx.Node) -> bool:
        """False for casts of the padding input and for asserts about types, proven by now."""
        return node not in self.plan.rows.padding and node.meta["val"] is not None

    def _cache_inputs(self, index: int, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        made = []
        for letter, operand in (("k", "k_BGTD"), ("v", "v_BGTE")):
            value: Tensor = argument(node, operand).meta["val"]
            name = f"{letter}_cache_{index}"
            axes = (BLOCKS, BLOCK_SIZE, int(value.shape[1]), int(value.shape[3]))
            made.append(self.builder.input(name, self.fake.tensor(axes, value.dtype)))
            made[-1].meta["layer"] = node.meta.get("layer", "")
            self.caches.append(InputSpec(name, "cache"))
        return made[0], made[1]

    def _paged(self, node: fx.Node, k_cache: fx.Node, v_cache: fx.Node) -> fx.Node:
        q, k, v = (self.whole[argument(node, name)] for name in ("q_BHSD", "k_BGTD", "v_BGTE"))
        sinks = argument(node, "sinks_H")
        write = [k_cache, v_cache, k, v, self.inputs["slots"]]
        self.builder.emit(kv_write.SPEC.overload, write, like=[node])
        attributes = {name: argument(node, name) for name in ("scale", "window", "softcap")}
        bounds = peak_bounds(node)
        if bounds is not None and bounds != (0.0, 0.0):
            attributes |= {"least_peak": bounds[0], "most_peak": bounds[1]}
            self._assume(str(argument(node, "hidden")), node)
        step = [self.inputs[name] for name in ("block_tables", "query_start", "kv_lens")]
        return self.builder.emit(
            paged_attention.SPEC.overload,
            [q, k_cache, v_cache, *step, None if sinks is None else self.whole[sinks]],
            attributes,
            like=[node],
        )

    def _assume(self, hidden: str, node: fx.Node) -> None:
        if hidden not in {known.subject for known in self.assumed}:
            layer, source = node.meta["layer"], node.meta["source"]
            site = self.builder.site
            self.assumed.append(Assumption("hidden-weighs-nothing", hidden, site, layer, source))

    def _size(self, node: fx.Node, operand: Callable[[fx.Node], Any], count: fx.Node) -> Any:
        """A size of the old graph: batch is 1, the sequence is the number of rows."""
        batch, sequence = shape_of(self.plan.tokens)
        known = {str(batch): 1, str(sequence): count}
        value = node.meta["val"]
        if isinstance(value, int) or str(value) in known:
            return value if isinstance(value, int) else known[str(value)]
        args = fx.node.map_arg(node.args, operand)
        if not any(isinstance(a, fx.Node) for a in args):
            assert callable(node.target)
            return node.target(*args)
        return self.builder.copy(node, args, node.kwargs)

    def _rows_wanted(self, node: fx.Node) -> Any:
        """`node` restricted to the rows whose logits are wanted."""
        if node not in self.chosen:
            axis = self.plan.rows.of(node)
            value = self.whole[node]
            if axis is not None:
                rows = self.inputs["logit_rows"]
                value = self.builder.emit(
                    aten.index_select.default, [value, axis, rows], like=[node]
                )
            self.chosen[node] = value
        return self.chosen[node]

    def _copy_picked(self, node: fx.Node) -> fx.Node:
        """A value of the last row: the wanted rows stand on its batch axis."""
        rows = self.plan.rows
        if not rows.picked.isdisjoint(node.all_input_nodes):
            return self._copy(node, lambda n: self.picked[n] if n in self.picked else self.whole[n])
        source = node.args[0]
        assert isinstance(source, fx.Node)
        axis, batch = rows.of(source), rows.batch_of(source)
        args = [self._rows_wanted(source), batch, axis]
        value = self.builder.emit(aten.transpose.int, args, like=[node])
        if len(shape_of(node)) == len(shape_of(source)):
            return value
        return self.builder.emit(aten.select.int, [value, axis, 0], like=[node])

    def _copy(self, node: fx.Node, operand: Any) -> fx.Node:
        is_iota = node.target in (aten.arange.default, aten.arange.start, aten.arange.start_step)
        if is_iota and self.plan.rows.of(node) is not None:
            return self._positions(node)
        if node in self.plan.rows.tables:
            return self._table_rows(node, self.plan.rows.tables[node])
        args = fx.node.map_arg(node.args, operand)
        kwargs = fx.node.map_arg(node.kwargs, operand)
        return self.builder.copy(node, args, kwargs)

    def _positions(self, node: fx.Node) -> fx.Node:
        positions = self.inputs["positions"]
        dtype = node.meta["val"].dtype
        if dtype == torch.int64:
            return positions
        return self.builder.emit(aten._to_copy.default, [positions], {"dtype": dtype}, like=[node])

    def _table_rows(self, node: fx.Node, table: Table) -> fx.Node:
        """Entry `start + position` of a constant for every row."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        at = self.inputs["positions"]
        if table.start:
            at = self.builder.emit(aten.add.Tensor, [at, table.start], like=[node])
        if _is_table_of_rows(source, self.plan.rows):
            return self.builder.emit(aten.embedding.default, [self.whole[source], at], like=[node])
        args = [self.whole[source], table.dim, at]
        return self.builder.emit(aten.index_select.default, args, like=[node])


def _is_table_of_rows(source: fx.Node, rows: Rows) -> bool:
    """A float weight `[L, D]` of which only rows are read: a lookup, which backends do natively."""
    value = source.meta["val"]
    return (
        source.op == "get_attr"
        and value.ndim == 2
        and value.dtype.is_floating_point
        and all(user in rows.tables and rows.tables[user].dim == 0 for user in source.users)
    )
