"""A graph returns every tensor that the model returned, in its order; all else is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from helpers.module_state import state_of
from helpers.run_graph import assert_close
from helpers.tiny_models import tiny_llama
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.utils import ModelOutput

import graphopt
from graphopt.capture import capture
from graphopt.codegen.reference import ReferenceBackend
from graphopt.errors import CaptureError
from graphopt.ir.graph import Graph


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Plain:
    first: Tensor
    more: list[Any]
    nothing: Tensor | None = None


@dataclass
class Output(ModelOutput):
    logits: Tensor | None = None
    states: tuple[Tensor, ...] | None = None


class Net(nn.Module):
    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        return self.pack(x, self.linear(x))


def outputs(graph: Graph, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(ReferenceBackend().lower(graph)(*inputs))


def same(found: tuple[Tensor, ...], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("pack", "fields"),
    [
        (lambda x, y: y, lambda o: [o]),
        (lambda x, y: (y, x, y + 1), list),
        (lambda x, y: [y, (x, [y * 2])], lambda o: [o[0], o[1][0], o[1][1][0]]),
        (lambda x, y: {"b": y, "a": {"c": x}}, lambda o: [o["b"], o["a"]["c"]]),
        (lambda x, y: Pair(y, x), list),
        (lambda x, y: Plain(y, [x, y + 1]), lambda o: [o.first, *o.more]),
        (lambda x, y: (x, Plain(y, [])), lambda o: [o[0], o[1].first]),
        (lambda x, y: Output(y, (x, y + 1)), lambda o: [o.logits, *o.states]),
        (lambda x, y: (y, None, x), lambda o: [o[0], o[2]]),
        (lambda x, y: (y, y, x, x), list),
    ],
)
def test_every_container(
    pack: Callable[[Tensor, Tensor], Any], fields: Callable[[Any], list[Tensor]]
) -> None:
    model = Net(pack).eval()
    graph = capture(model, torch.randn(2, 4))
    x = torch.randn(5, 4)
    with torch.no_grad():
        same(outputs(graph, x), fields(model(x)))


@pytest.mark.parametrize(
    ("pack", "message"),
    [
        (lambda x, y: (y, 3), "int 3 as output 1"),
        (lambda x, y: {"y": y, "kind": "gelu"}, "str 'gelu' as kind"),
        (lambda x, y: Plain(y, [0.5]), r"float 0.5 as more\[0\]"),
        (lambda x, y: {"y": y, "rows": x.shape[0]}, r"a size \(s\d+\) as rows"),
        (lambda x, y: (y, {1, 2}), "an object set as "),
        (lambda x, y: {"y": [y, object()]}, r"an object object as y\[1\]"),
        (lambda x, y: None, "returns no tensor"),
    ],
)
def test_what_is_no_tensor_is_named(pack: Callable[[Tensor, Tensor], Any], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(Net(pack).eval(), torch.randn(2, 4))


def test_none_is_named_in_a_note() -> None:
    model = Net(lambda x, y: {"logits": y, "loss": None}).eval()
    graph = capture(model, torch.randn(2, 4))
    assert graph.notes == ("the model returns None as loss; it is no output",)
    assert graph.copy().notes == graph.notes
    assert list(graph.notes) == graphopt.compile(model, torch.randn(2, 4)).report.notes


def test_random_numbers_are_named_in_a_note() -> None:
    graph = capture(Net(lambda x, y: y + torch.rand(4)).eval(), torch.randn(2, 4))
    (note,) = graph.notes
    assert "draws random numbers" in note
    assert "aten.rand.default (test_outputs_complete.py:" in note
    quiet = Net(lambda x, y: nn.functional.dropout(y, 0.5, training=False)).eval()
    assert capture(quiet, torch.randn(2, 4)).notes == ()


@pytest.mark.parametrize("by_config", [False, True])
def test_attention_weights_and_hidden_states(by_config: bool) -> None:
    model = tiny_llama(attn_implementation="eager")
    ids = torch.randint(0, 101, (2, 9))
    call: dict[str, Any] = {"input_ids": ids}
    options = {"output_attentions": True, "output_hidden_states": True}
    if by_config:
        for name, value in options.items():
            setattr(model.config, name, value)
    else:
        call |= options
    state = state_of(model)
    graph = capture(model, call)
    assert state_of(model) == state
    assert any("uses attention weights" in note for note in graph.notes)
    other = torch.randint(0, 101, (3, 12))
    with torch.no_grad():
        expected = model(**{**call, "input_ids": other}, use_cache=False)
    assert len(expected.attentions) == 2
    same(outputs(graph, other), pytree.tree_leaves(dict(expected)))


class Wraps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out


HOOKS: dict[str, Callable[[Wraps], Any]] = {
    "before the model": lambda m: m.register_forward_pre_hook(
        lambda _m, args, kwargs: (args, {"x": kwargs["x"] * 2} if kwargs else {}),
        with_kwargs=True,
    ),
    "after the model": lambda m: m.register_forward_hook(lambda _m, _a, out: out * 3),
    "before a part": lambda m: m.linear.register_forward_pre_hook(lambda _m, a: (a[0] * 2,)),
    "after a part": lambda m: m.linear.register_forward_hook(lambda _m, _a, out: out * 3),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_are_part_of_the_model(name: str) -> None:
    torch.manual_seed(0)
    model = Wraps().eval()
    x = torch.randn(5, 4)
    plain = model(x).detach()
    HOOKS[name](model)
    graph = capture(model, {"x": torch.randn(2, 4)})
    with torch.no_grad():
        expected = model(x=x)
    assert not torch.allclose(expected, plain)
    same(outputs(graph, x), [expected])


def test_hooks_that_cannot_be_captured_are_refused() -> None:
    model = Wraps().eval()
    model.register_forward_pre_hook(lambda _m, args: args)
    with pytest.raises(CaptureError, match="forward pre-hook of its own"):
        capture(model, torch.randn(2, 4))
    handle = nn.modules.module.register_module_forward_hook(lambda _m, _a, out: out * 5)
    try:
        with pytest.raises(CaptureError, match="registered on all modules"):
            capture(Wraps().eval(), torch.randn(2, 4))
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (torch.compile, r"torch\.compile.*_orig_mod"),
        (nn.DataParallel, r"DataParallel.*\.module"),
        (lambda m: torch.jit.trace(m, torch.randn(2, 4)), "TorchScript"),
        (lambda m: nn.Sequential(m, nn.LazyLinear(3)), r"1 \(LazyLinear\) has no weights yet"),
    ],
)
def test_wrappers_are_named(wrap: Callable[[nn.Module], nn.Module], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(wrap(Wraps().eval()).eval(), torch.randn(2, 4))


def test_weights_that_are_no_plain_tensors_are_named() -> None:
    class Scaled(Tensor):
        pass

    model = Wraps().eval()
    model.linear.weight = nn.Parameter(torch.randn(4, 4).as_subclass(Scaled))
    with pytest.raises(CaptureError, match=r"weight 'linear\.weight' is a Scaled"):
        capture(model, torch.randn(2, 4))


def test_autocast_around_the_capture_is_refused() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(CaptureError, match="autocast"):
        capture(Wraps().eval(), torch.randn(2, 4))
    assert not torch.is_autocast_enabled("cpu")
