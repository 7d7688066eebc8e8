"""The only place where nodes are made: shape, layer, source line and history are never missing.

`emit` runs the op on the fake values of its arguments, so a rewrite that does not type-check
fails where it is written, not at run time.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import Argument, map_arg

from graphopt.errors import VerifyError
from graphopt.ir.graph import Graph, op_name


class GraphBuilder:
    """Adds nodes to a graph. `site` names the rewrite that asks for them ("fuse_norm#3")."""

    def __init__(self, graph: Graph, mode: FakeTensorMode | None = None) -> None:
        self.graph = graph
        self.site = ""
        self._mode = mode

    @property
    def mode(self) -> FakeTensorMode:
        """The fake mode that owns the graph's symbolic sizes."""
        if self._mode is None:
            for node in self.graph.nodes:
                if isinstance(node.meta.get("val"), FakeTensor):
                    self._mode = node.meta["val"].fake_mode
                    break
        if self._mode is None:
            raise VerifyError(f"graph {self.graph.name!r} has no tensor input to infer from")
        return self._mode

    @contextmanager
    def at(self, node: fx.Node, site: str = "") -> Iterator[None]:
        """Insert before `node`, on behalf of `site`."""
        previous = self.site
        self.site = site or previous
        with self.graph.fx_graph.inserting_before(node):
            yield
        self.site = previous

    def infer(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Fake result of calling `target`.

        Results are remembered by op and operand types: the layers of a model repeat them.
        """
        fake_args, fake_kwargs = map_arg((args, kwargs), lambda n: n.meta["val"])
        key = (id(self.mode), target, type_key(fake_args), type_key(fake_kwargs))
        if key not in self.graph.inferred:
            # Without the Python dispatcher some ATen ops would fix symbolic sizes to their hints.
            with enable_python_dispatcher(), self.mode, torch.no_grad():
                self.graph.inferred[key] = target(*fake_args, **fake_kwargs)
        return self.graph.inferred[key]

    def emit(
        self,
        target: Callable[..., Any],
        args: Sequence[Argument],
        kwargs: dict[str, Argument] | None = None,
        *,
        like: Sequence[fx.Node],
    ) -> fx.Node:
        """A call_function node. `like`: the nodes it replaces or comes from; the first gives the
        source line, their common prefix the layer, all of them the history."""
        kwargs = kwargs or {}
        value = self.infer(target, tuple(args), kwargs)
        node = self.graph.fx_graph.call_function(target, tuple(args), kwargs)
        node.meta.update(val=value, number=self.graph.take_number())
        self._describe(node, like)
        return node

    def copy(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        """The same call on other arguments, keeping its provenance; shapes inferred anew."""
        assert callable(node.target)
        new = self.emit(node.target, args, kwargs, like=[node])
        new.meta["layer"] = node.meta.get("layer", "")
        return new

    def weight(
        self, name: str, tensor: Tensor | None = None, *, like: Sequence[fx.Node]
    ) -> fx.Node:
        """A node that reads weight `name`; `tensor` registers new data under that name."""
        if tensor is not None:
            self.graph.weights[name] = tensor
        data = self.graph.weights[name]
        node = self.graph.fx_graph.create_node("get_attr", name)
        node.meta["val"] = self._stand_in(tuple(data.shape), data.dtype)
        self._describe(node, like)
        return node

    def _stand_in(self, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        """The fake value of a weight; those of one type share it."""
        key = (id(self.mode), "weight", shape, dtype)
        if key not in self.graph.inferred:
            with self.mode:
                self.graph.inferred[key] = torch.empty(shape, dtype=dtype, device="cpu")
        return self.graph.inferred[key]

    def input(self, name: str, value: Any) -> fx.Node:
        """A placeholder with fake value `value`."""
        node = self.graph.fx_graph.placeholder(name)
        node.meta.update(val=value, layer="", source="", history=frozenset([f"%{name}"]))
        return node

    def _describe(self, node: fx.Node, like: Sequence[fx.Node]) -> None:
        history: set[str] = {self.site} if self.site else set()
        for origin in like:
            history |= origin.meta.get("history", frozenset())
        node.meta["history"] = frozenset(history)
        node.meta["source"] = next((n.meta["source"] for n in like if n.meta.get("source")), "")
        layers = [n.meta["layer"].split(".") for n in like if n.meta.get("layer")]
        common = os.path.commonprefix(layers) if layers else []
        node.meta["layer"] = ".".join(common)


def replace(graph: Graph, old: fx.Node, new: fx.Node) -> None:
    """Let every user of `old` read `new`, then remove `old`. Same shape and dtype are required.

    A node that nobody reads yet takes over the number of `old`: it is the same value, and the lines
    of its readers stay as they are.
    """
    before, after = old.meta["val"], new.meta["val"]
    if isinstance(before, Tensor):
        same = len(before.shape) == len(after.shape) and before.dtype == after.dtype
        if not same:
            raise VerifyError(
                f"{op_name(new)} {after.dtype} rank {len(after.shape)} cannot replace "
                f"{op_name(old)} {before.dtype} rank {len(before.shape)}"
            )
    if not new.users and new.op == old.op == "call_function":
        new.meta["number"] = old.meta["number"]
    old.replace_all_uses_with(new)
    graph.fx_graph.erase_node(old)


def type_key(value: Any) -> Any:
    """What shape inference can see of an argument, hashable."""
    if isinstance(value, Tensor):
        sizes = tuple(type_key(s) for s in value.shape)
        return (value.dtype, value.device, sizes, tuple(type_key(s) for s in value.stride()))
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return ("symbolic", value.node.expr)
    if isinstance(value, (list, tuple)):
        return tuple(type_key(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, type_key(v)) for k, v in sorted(value.items()))
    return (type(value), value)
