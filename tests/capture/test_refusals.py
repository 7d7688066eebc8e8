"""Every refusal of capture: what is in the way, the line of the model, and what to do."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.run_graph import assert_close, run
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.errors import CaptureError


class Rule(nn.Module):
    def __init__(self, rule: Callable[[Rule, Tensor], Any]) -> None:
        super().__init__()
        self.rule = rule
        self.linear = nn.Linear(16, 16)
        self.register_buffer("table", torch.randn(64, 16))
        self.empty = torch.zeros(16, device="meta")

    def forward(self, x: Tensor) -> Any:
        return self.rule(self, x)


@torch.library.custom_op("graphopt_tests::shapeless", mutates_args=())
def shapeless(x: Tensor) -> Tensor:
    return x.clone()


@functools.lru_cache
def cached_table(length: int) -> Tensor:
    return torch.arange(length)


def item(model: Rule, x: Tensor) -> Any:
    return x if x.sum().item() > 3 else -x


def truth(model: Rule, x: Tensor) -> Any:
    return x if x.sum() > 3 else -x


def size_of_data(model: Rule, x: Tensor) -> Any:
    kept = x[x > 0]
    return kept if kept.shape[0] > 4 else -kept


def number_of_data(model: Rule, x: Tensor) -> Any:
    return x.topk(int(x.argmax()), -1)[0]


def close(model: Rule, x: Tensor) -> Any:
    assert torch.allclose(x, x)
    return x


def as_numpy(model: Rule, x: Tensor) -> Any:
    return torch.from_numpy(x.numpy())


def without_fake(model: Rule, x: Tensor) -> Any:
    return shapeless(x)


def nested(model: Rule, x: Tensor) -> Any:
    return torch.nested.nested_tensor([x[0]])


def meta(model: Rule, x: Tensor) -> Any:
    return x + model.empty


def shapes(model: Rule, x: Tensor) -> Any:
    return x @ torch.ones(15, 3)


def raises(model: Rule, x: Tensor) -> Any:
    raise ValueError("the sequence must be shorter than 4")


def unfinished(model: Rule, x: Tensor) -> Any:
    raise NotImplementedError


def endless(model: Rule, x: Tensor) -> Any:
    return endless(model, x)


def cached(model: Rule, x: Tensor) -> Any:
    return x + cached_table(x.shape[0])[:, None]


def by_key(model: Rule, x: Tensor) -> Any:
    return x * {16: 1}.get(x.shape[0], 2)


def an_object(model: Rule, x: Tensor) -> Any:
    return iter([x])


def gradients(model: Rule, x: Tensor) -> Any:
    return torch.autograd.grad(x.sum(), x)[0]


def scripted(model: Rule, x: Tensor) -> Any:
    return torch.jit.script(lambda y: y)(x)


def absent_device(model: Rule, x: Tensor) -> Any:
    return x.to("cuda")


def missing(model: Rule, x: Tensor) -> Any:
    return model.linear()


def unknown(model: Rule, x: Tensor) -> Any:
    return model.linear(x, bias=None)


def none(model: Rule, x: Tensor) -> Any:
    return x + None  # type: ignore[operator]


def index(model: Rule, x: Tensor) -> Any:
    return x.transpose(1, 5)


def branches(model: Rule, x: Tensor) -> Any:
    return torch.cond(x.sum() > 3, lambda y: y * 2, lambda y: y * 3, (x,))


def mapped(model: Rule, x: Tensor) -> Any:
    return torch.vmap(lambda y: y * 2)(x)


def flexible(model: Rule, x: Tensor) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(x[None, None], x[None, None], x[None, None])


def sparse(model: Rule, x: Tensor) -> Any:
    return torch.sparse.mm(x.to_sparse(), model.table[:16])


def state(model: Rule, x: Tensor) -> Any:
    model.table.add_(1)
    return x + model.table[0]


def in_place(model: Rule, x: Tensor) -> Any:
    x.add_(1)
    return x * 2


def number(model: Rule, x: Tensor) -> Any:
    return x, 3


def fixed_size(model: Rule, x: Tensor) -> Any:
    return x * float(x.shape[0])


CASES: list[tuple[Callable[..., Any], str, str]] = [
    (item, "Python branches on the value of a tensor", "torch.where"),
    (truth, "Python branches on the value of a tensor", "torch.where"),
    (size_of_data, "a size that depends on the values", "keep the full size"),
    (number_of_data, "becomes a Python number", "pass the number as a Python argument"),
    (close, "reads a value of a tensor through aten.allclose", "torch.where"),
    (as_numpy, "numpy array", "use the torch function"),
    (without_fake, "graphopt_tests::shapeless", "register_fake"),
    (nested, "nested tensor", "padded tensor"),
    (meta, "without data (device meta)", "load the weights"),
    (shapes, "shapes of the example do not fit", "it is x float32 [4, 16]"),
    (raises, "ValueError: the sequence must be shorter than 4", "eager"),
    (unfinished, "raises NotImplementedError", "implement the method"),
    (endless, "calls itself without an end", "an end"),
    (cached, "key of a cache or a dict", "without the cache"),
    (by_key, "key of a cache or a dict", "fix the size"),
    (gradients, "computes gradients", "take this call out"),
    (scripted, "TorchScript", "capture the Python module"),
    (absent_device, "does not have", "x.device"),
    (missing, "missing 1 required positional argument: 'input'", "by name"),
    (unknown, "does not know the argument 'bias'", "leave it out"),
    (none, "TypeError: unsupported operand", "eager"),
    (index, "out of range", "check the shapes"),
    (branches, "torch.cond chooses", "torch.where"),
    (mapped, "vmap maps a function", "write the batch dimension out"),
    (flexible, "flex_attention", "scaled_dot_product_attention"),
    (sparse, "a sparse tensor is made", "dense"),
    (state, "changes its state (buffer_mutation of table)", "remove the mutation"),
    (in_place, "changes its input 'x' in place", "clone the input"),
    (fixed_size, "axis 0 ('batch') of 'x' is fixed at 4", "leave this axis out"),
]


@pytest.mark.parametrize(
    ("rule", "what", "mend"), CASES, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_refusal_names_the_object_the_line_and_the_mend(
    rule: Callable[..., Any], what: str, mend: str
) -> None:
    first_line = inspect.getsourcelines(rule)[1]
    last_line = first_line + len(inspect.getsourcelines(rule)[0]) - 1
    with pytest.raises(CaptureError) as caught:
        capture(Rule(rule).eval(), torch.randn(4, 16))
    first = str(caught.value).splitlines()[0]
    assert what in first
    assert mend in first
    # What is found in the finished graph has the line of the module's forward.
    lines = [*range(first_line, last_line + 1), inspect.getsourcelines(Rule.forward)[1] + 1]
    places = [f"test_refusals.py:{line}" for line in lines]
    assert any(place in first for place in places), first


@pytest.mark.parametrize(
    ("rule", "what"),
    [(number, "returns int 3"), (an_object, "returns an object list_iterator")],
)
def test_what_has_no_line_is_named(rule: Callable[..., Any], what: str) -> None:
    with pytest.raises(CaptureError, match=what):
        capture(Rule(rule).eval(), torch.randn(4, 16))


def test_a_part_under_autocast_is_captured_as_it_is() -> None:
    def rule(model: Rule, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model.linear(x)
        return y * 3

    model, x = Rule(rule).eval(), torch.randn(5, 16)
    graph = capture(model, torch.randn(4, 16))
    with torch.no_grad():
        expected = model(x)
        assert expected.dtype == torch.bfloat16
        assert_close(run(graph, x), expected)


def test_torchs_own_text_follows() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Rule(truth).eval(), torch.randn(4, 16))
    assert "GuardOnDataDependentSymNode" in str(caught.value).partition("\n")[2]


class Starred(nn.Module):
    def forward(self, x: Tensor, *others: Tensor, scale: float = 2.0) -> Tensor:
        return x * scale + sum(others)


class ByPosition(nn.Module):
    def forward(self, x: Tensor, /, y: Tensor) -> Tensor:
        return x * 2 + y


@pytest.mark.parametrize(
    ("model", "names"),
    [(Starred(), ["x", "others_0", "others_1"]), (ByPosition(), ["x", "y"])],
)
def test_arguments_by_position_alone(model: nn.Module, names: list[str]) -> None:
    import graphopt

    example = [torch.randn(2, 3) for _ in names]
    program = graphopt.compile(model.eval(), example, backend="reference")
    assert [spec.name for spec in program.graph.inputs] == names
    given = [torch.randn(5, 3) for _ in names]
    torch.testing.assert_close(program(*given), model(*given))


def test_too_many_arguments_are_named() -> None:
    with pytest.raises(CaptureError, match=r"3 example arguments for forward\(x, y\)"):
        capture(ByPosition().eval(), [torch.randn(2, 3)] * 3)


def test_an_example_of_one_is_named() -> None:
    with pytest.raises(CaptureError, match=r"axis 0 \(batch\) of .* 'x' has size 1.*at least 2"):
        capture(Rule(shapes).eval(), torch.randn(1, 16))
