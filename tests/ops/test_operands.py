"""Each op refuses operands and attributes that it cannot compute with, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.errors import UnsupportedError
from graphopt.ir.opset import load_all
from graphopt.ops.predicate import check

SPECS = load_all()


def f(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(sizes, dtype=dtype)


def i(*sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=torch.int64)


def codes(*sizes: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.empty(sizes, dtype=dtype)


LOW_BIT = {"bits": 4, "group": 32, "offset": 8}
PAGED = (f(1, 4, 7, 8), f(9, 16, 2, 8), f(9, 16, 2, 8), i(3, 2), i(4), i(3))
# op -> (operands, attributes) that are right, then changes of them by position or name, each wrong.
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], list[dict[Any, Any]]]] = {
    "rms_norm": ((f(2, 8), f(8)), {"eps": 1e-6}, [
        {1: f(7)}, {1: f(1, 8)}, {0: i(2, 8)}, {0: f()}, {"eps": float("nan")},
        {0: f(2, 8, dtype=torch.complex64)},
    ]),
    "layer_norm": ((f(2, 8), f(8), f(8)), {"eps": 1e-6}, [
        {1: f(7)}, {2: f(1)}, {2: i(8)}, {0: i(2, 8)}, {"eps": float("inf")},
    ]),
    "swiglu": ((f(2, 8), f(2, 8)), {}, [
        {1: f(2, 7)}, {1: f(8)}, {1: f(2, 8, dtype=torch.float16)}, {0: i(2, 8), 1: i(2, 8)},
    ]),
    "geglu": ((f(2, 8), f(2, 8)), {"approximate": "tanh"}, [
        {1: f(1, 8)}, {"approximate": "erf"}, {0: i(2, 8), 1: i(2, 8)},
    ]),
    "rope": ((f(2, 4, 5, 8), f(1, 5, 8), f(1, 5, 8)), {}, [
        {1: f(1, 5, 10)}, {2: f(1, 5, 6)}, {1: f(3, 5, 8), 2: f(3, 5, 8)}, {0: f(4, 5, 8)},
        {1: f(1, 6, 8), 2: f(1, 6, 8)}, {1: f(1, 5, 7), 2: f(1, 5, 7)}, {0: i(2, 4, 5, 8)},
    ]),
    "kv_write": ((f(9, 16, 2, 8), f(9, 16, 2, 6), f(1, 2, 7, 8), f(1, 2, 7, 6), i(7)), {}, [
        {2: f(1, 2, 7, 6)}, {3: f(1, 2, 6, 6)}, {2: f(2, 2, 7, 8)}, {2: f(1, 3, 7, 8)},
        {4: f(7)}, {0: f(9, 16, 16)}, {4: i(7, 1)}, {1: i(9, 16, 2, 6)},
    ]),
    "paged_attention": (PAGED, {"scale": 0.5}, [
        {0: f(1, 3, 7, 8)}, {0: f(1, 4, 7, 6)}, {2: f(9, 16, 1, 8)}, {3: i(2, 2)}, {4: i(2, 2)},
        {5: f(3)}, {"window": -1}, {"softcap": -1.0}, {"scale": float("nan")}, {6: f(3)},
        {1: f(9, 16, 0, 8), 2: f(9, 16, 0, 8)},
    ]),
    "attention": ((f(2, 4, 5, 8), f(2, 2, 6, 8), f(2, 2, 6, 7)), {"scale": 0.5}, [
        {1: f(2, 2, 6, 7)}, {2: f(2, 2, 5, 7)}, {1: f(2, 3, 6, 8), 2: f(2, 3, 6, 7)},
        {1: f(3, 2, 6, 8)}, {0: f(4, 5, 8)}, {3: i(5, 6)}, {4: f(2, 5)}, {5: f(3)},
        {"window": -1}, {"predicate": "q ** 2"}, {"bias": "aux0[k]"}, {"hidden": "mask"},
        {"scale": float("inf")}, {"softcap": -2.0},
    ]),
    "linear_wq": ((f(2, 64), codes(3, 32), f(3, 2), f(3, 2), f(3)),
                  {**LOW_BIT, "activation": "int8"}, [
        {0: f(2, 32)}, {1: codes(3, 32, dtype=torch.int8)}, {2: f(3, 1)}, {3: f(2, 2)},
        {4: f(2)}, {"bits": 5}, {"bits": 8}, {"group": 0}, {"group": 48}, {"activation": "int4"},
        {"offset": 2**40}, {2: codes(3, 2)},
        {0: f(2, 16), 1: codes(3, 8), 2: f(3, 1), 3: f(3, 1), "group": 16},
    ]),
    "embedding_wq": ((i(2, 3), codes(9, 32), f(9, 2)), {**LOW_BIT, "dtype": torch.float32}, [
        {0: f(2, 3)}, {1: codes(9, 30)}, {2: f(8, 2)}, {"group": 7}, {"dtype": torch.int64},
        {"bits": 3},
    ]),
}  # fmt: skip
WRONG = [(op, n) for op, (_, _, changes) in CALLS.items() for n in range(len(changes))]


def call(op: str, operands: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in operands]
        return SPECS[f"graphopt.{op}"].overload(*fakes, **attributes)


def test_every_op_has_its_cases() -> None:
    assert {f"graphopt.{op}" for op in CALLS} == {n for n in SPECS if n.startswith("graphopt.")}


@pytest.mark.parametrize("op", CALLS)
def test_what_is_right_is_taken(op: str) -> None:
    operands, attributes, _ = CALLS[op]
    call(op, operands, attributes)


@pytest.mark.parametrize(("op", "number"), WRONG)
def test_what_is_wrong_is_refused(op: str, number: int) -> None:
    operands, attributes, changes = CALLS[op]
    change = changes[number]
    given = dict(enumerate(operands)) | {k: v for k, v in change.items() if isinstance(k, int)}
    placed = tuple(given.get(place) for place in range(max(given) + 1))
    named = attributes | {k: v for k, v in change.items() if isinstance(k, str)}
    with pytest.raises((ValueError, UnsupportedError)):
        call(op, placed, named)


@pytest.mark.parametrize(
    "text",
    ["aux0[b, k] == aux0[b, q]", "where(k < q, 1.0, inf)", "not (k > 4)", "bf16(-1e9)", "s - 1e4",
     "min(q, k) // 2", "float(aux0[h]) * float(k - q)"],
)  # fmt: skip
def test_the_language_of_predicates(text: str) -> None:
    check(text, 1, frozenset({"s"}))


@pytest.mark.parametrize(
    "text",
    ["x", "q ** 2", "aux1[b]", "min(q)", "where(q, k)", "q[b]", "(1).real", "'a'", "q if k else b",
     "__import__('os')", "a b", "9" * 30, "-" * 5000 + "q", "q" + "+q" * 60_000, "\0", "q\n+k\n-",
     "lambda: q", "[q for q in k]", "q == k == b", "mask"],
)  # fmt: skip
def test_what_is_no_predicate(text: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        check(text, 1, frozenset({"s"}))
    assert len(str(error.value)) < 1000
