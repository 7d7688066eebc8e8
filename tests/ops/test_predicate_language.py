"""The language of predicate, bias and hidden: operators, functions, bounds, sums, refusals."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.errors import UnsupportedError
from graphopt.ops import predicate as language

B, H, S, T = 2, 3, 4, 6
AUX = (torch.arange(12).view(2, 6) % 5, torch.linspace(-1, 1, 3))
CPU = torch.device("cpu")


def evaluated(text: str, rows: range = range(S), **more: Tensor) -> Tensor:
    found = language.evaluate(text, (B, H, S, T), AUX, rows, CPU, more)
    return found.expand(B, H, len(rows), T)


def by_hand(function: Callable[..., Any], rows: range = range(S)) -> Tensor:
    """`function(b, h, q, k)` at every place; q is the position among the keys."""
    places = itertools.product(range(B), range(H), rows, range(T))
    made = [function(b, h, i + T - S, k) for b, h, i, k in places]
    return torch.tensor(made, dtype=torch.float64).view(B, H, len(rows), T)


OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
    "!=": operator.ne,
}


@pytest.mark.parametrize("sign", OPERATORS)
def test_every_operator(sign: str) -> None:
    combine = OPERATORS[sign]
    found = evaluated(f"(q - 1) {sign} (k + 2)")
    wanted = by_hand(lambda b, h, q, k: combine(q - 1, k + 2))
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-6, atol=0)


def test_every_operator_and_function_has_a_case() -> None:
    assert set(language._BINARY.values()) == set(OPERATORS.values())
    assert set(language._FUNCTIONS) == set(FUNCTIONS)


FUNCTIONS: dict[str, tuple[str, Callable[[int, int], Any]]] = {
    "where": ("where(q > k, 1.5, -2.0)", lambda q, k: 1.5 if q > k else -2.0),
    "float": ("float(q) / 4", lambda q, k: q / 4),
    "abs": ("abs(q - k)", lambda q, k: abs(q - k)),
    "min": ("min(q, k)", min),
    "max": ("max(q, k)", max),
    "bf16": ("bf16(257.0 + q)", lambda q, k: float(torch.tensor(257.0 + q).bfloat16())),
    "f16": ("f16(2049.0 + q)", lambda q, k: float(torch.tensor(2049.0 + q).half())),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function(name: str) -> None:
    text, function = FUNCTIONS[name]
    wanted = by_hand(lambda b, h, q, k: function(q, k))
    assert torch.equal(evaluated(text).double(), wanted.double())


@pytest.mark.parametrize(
    ("text", "function"),
    [
        ("b", lambda b, h, q, k: b),
        ("h", lambda b, h, q, k: h),
        ("q", lambda b, h, q, k: q),
        ("k", lambda b, h, q, k: k),
        ("S * 100 + T", lambda b, h, q, k: S * 100 + T),
        ("aux0[b, k]", lambda b, h, q, k: int(AUX[0][b, k])),
        ("aux1[h]", lambda b, h, q, k: float(AUX[1][h])),
        ("-q", lambda b, h, q, k: -q),
        ("not q > k", lambda b, h, q, k: not q > k),
        ("q > k and k > 1", lambda b, h, q, k: q > k and k > 1),
        ("q > k or k > 4 or b == 1", lambda b, h, q, k: q > k or k > 4 or b == 1),
        ("q and k", lambda b, h, q, k: bool(q and k)),
        ("True", lambda b, h, q, k: True),
        ("-inf", lambda b, h, q, k: -math.inf),
        ("where(True, -1e38, 0.0) * 10.0", lambda b, h, q, k: -1e39),
    ],
)
def test_names_and_logic(text: str, function: Callable[..., Any]) -> None:
    for rows in (range(S), range(1, 3)):
        assert torch.equal(evaluated(text, rows).double(), by_hand(function, rows).double())


def test_further_names() -> None:
    scores = torch.randn(B, H, S, T)
    assert torch.equal(evaluated("s + -1.0", s=scores), scores - 1)


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "aux9[b, k]",
        "q.shape",
        "print(q)",
        "__import__('os')",
        "where(q, k, x=1)",
        "float(x=q)",
        "q < k < T",
        "'text'",
        "1j",
        "lambda: q",
        "q << k",
        "q is k",
        "+q",
        "q k",
        "",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UnsupportedError, match=r"no expression|no meaning"):
        evaluated(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-10000.0", (-1e4, False)),
        ("5", (5.0, False)),
        ("-inf", (-math.inf, False)),
        ("inf", (math.inf, False)),
        ("s + -10000.0", (-1e4, True)),
        ("s", (0.0, True)),
        ("-3.0 + s + -4.0", (-7.0, True)),
        ("bf16(s + -2.0)", (-2.0, True)),
        ("f16(-2.0)", (-2.0, False)),
        ("where(q > k, -5.0, -1.0)", (-1.0, False)),
        ("where(q > k, -1.0, -5.0)", (-1.0, False)),
        ("where(q > k, s + -5.0, -1.0)", (-1.0, True)),
        ("s - 10000.0", None),
        ("-s", None),
        ("s * 2.0", None),
        ("-(s + 1.0)", None),
        ("-(1.0 + 1.0)", None),
        ("aux0[b, k]", None),
        ("s + aux0[b, k]", None),
        ("where(q > k, aux0[b, k], 1.0)", None),
        ("where(q > k, 1.0, aux0[b, k])", None),
        ("bf16(aux0[b, k])", None),
        ("abs(-2.0)", None),
        ("t", None),
    ],
)
def test_the_highest_that_a_text_may_be(text: str, expected: tuple[float, bool] | None) -> None:
    assert language.highest(text, "s") == expected


@pytest.mark.parametrize(
    ("text", "added"),
    [
        ("s + -1.0", "-1.0"),
        ("s - 2.0", "-2.0"),
        ("s - (mask + 1.0)", "-(mask + 1.0)"),
        ("s + (mask + 1.0)", "mask + 1.0"),
        ("s + s", None),
        ("s - s", None),
        ("s + where(q > k, s, 1.0)", None),
        ("mask + s", None),
        ("s * 2.0", None),
        ("s", None),
        ("-1.0", None),
        ("", None),
        ("s + 1.0 + 2.0", None),
    ],
)
def test_what_is_added_to_the_score(text: str, added: str | None) -> None:
    assert language.added_to("s", text) == added
