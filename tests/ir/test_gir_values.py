"""Every value, size function, type and limit that the graph text knows: written and read back."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.op_graph import OpGraph
from torch import fx

from graphopt.errors import ProgramFormatError, VerifyError
from graphopt.ir import limits
from graphopt.ir.graph import Graph
from graphopt.ir.limits import Limit
from graphopt.ir.shapes import DTYPE_NAMES, DTYPES_BY_NAME, SymbolicInputs
from graphopt.ir.size_arithmetic import SIZE_FUNCTIONS
from graphopt.ir.text import parser
from graphopt.ir.text.names import comment_text, plain_name, weight_text
from graphopt.ir.text.parser import first_difference, parse_graph
from graphopt.ir.text.printer import Printer, print_graph

aten = torch.ops.aten


def _args(value: Any) -> Any:
    """The argument as the text gives it back."""
    g = OpGraph()
    graph = g.returns(g.call(aten.clone.default, g.input("x", torch.zeros(2))))
    reader = parser._Parser({}, {}, (), SymbolicInputs(), {})
    written = Printer(graph).value(value)
    call = parser.read_call(f"%0 : f32[2] = aten.clone({written})  #  |")
    assert call is not None
    (found,), _ = reader._arguments(call.arguments)
    return found


VALUES = [
    *(None, True, False, 0, -3, 7, 10**12, 0.5, -2.5e-7, 1e300, 1.0, math.inf, -math.inf),
    *("", "text", 'with "quotes" and \\', "é\n", [], [1, -1, 2.0], [[1], None]),
    *(torch.device("cpu"), torch.device("meta"), torch.device("cuda"), torch.strided),
    *(torch.contiguous_format, torch.preserve_format, torch.channels_last),
    *(torch.channels_last_3d, *DTYPE_NAMES),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_every_value_reads_back(value: Any) -> None:
    found = _args(value)
    assert found == value
    assert type(found) is type(value)


def test_not_a_number_reads_back() -> None:
    assert math.isnan(_args(math.nan))


def test_every_constant_has_a_case() -> None:
    texts = {Printer(Graph("", fx.GraphModule({}, fx.Graph()), (), {})).value(v) for v in VALUES}
    assert set(parser._CONSTANTS) <= {*texts, "float.nan"}


@pytest.mark.parametrize("value", [object(), {1: 2}, 1j])
def test_a_value_without_a_text_is_refused(value: Any) -> None:
    with pytest.raises(VerifyError, match="no textual form"):
        _args(value)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        name: getattr(operator, name)
        for name in ("add", "sub", "mul", "floordiv", "mod", "neg", "truediv", "pow", "getitem")
    },
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{
        name: getattr(torch, name)
        for name in ("sym_max", "sym_min", "sym_float", "sym_int", "sym_not")
    },
    **{name: getattr(math, name) for name in ("ceil", "floor", "trunc")},
}


@pytest.mark.parametrize("name", dict.fromkeys((*FUNCTIONS, *SIZE_FUNCTIONS)))
def test_every_function_of_sizes(name: str) -> None:
    assert SIZE_FUNCTIONS[name] is FUNCTIONS[name]


SIZES = """gir 1
graph "sizes" captured
input %x : f32[n, m] user
%0 : size[n] = aten.sym_size.int(%x, 0)  #  |
%1 : size[m] = aten.sym_size.int(%x, 1)  #  |
%2 : size[m + n] = sym.add(%0, %1)  #  |
%3 : size[(n//2)] = sym.floordiv(%0, 2)  #  |
%4 : size[2*m] = sym.mul(%1, 2)  #  |
%5 : f32[n, m] = aten.clone(%x)  #  |
return %5
"""


def test_sizes_of_sizes_read_back() -> None:
    graph = parse_graph(SIZES, {})
    again = parse_graph(print_graph(graph), {})
    assert first_difference(graph, again) is None
    assert "%2 : size[m + n] = sym.add(%0, %1)" in print_graph(again)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sym.add", "sym.exec", "unknown op 'sym.exec'"),
        ("sym.add", "aten.relu", "does not type-check"),
        ("[m + n]", "[m - n]", "the operands give"),
        ("%4 : size", "%04 : size", "not a line of a graph"),
        ("f32[n, m]", "f99[n, m]", "is not a tensor type"),
        ("f32[n, m]", "f32[n, -1]", "neither a number nor a name"),
        ("user", "caller", "not a line of a graph"),
        ("(%0, %1)", "(%0 %1)", "expected ','"),
        ("(%1, 2)", "(%1, [2)", "not closed"),
        ("(%1, 2)", "(%1, )", None),
        ("(%1, 2)", "(%1, key=)", "an argument is missing"),
        ("(%1, 2)", "(%1, ;)", "cannot read"),
        ("(%1, 2)", "(%1, dtype.f99)", "is not a value"),
        ("return %5", "return %5\nreturn %x", "text after return"),
        ("return %5", "return %4", "returns tensors"),
        ('"sizes" captured', '"sizes" other', "not a line of a graph"),
    ],
)
def test_text_that_is_wrong_in_one_place(old: str, new: str, message: str | None) -> None:
    assert old in SIZES
    with pytest.raises(ProgramFormatError, match=message) as refused:
        parse_graph(SIZES.replace(old, new, 1), {})
    assert "of the graph text" in str(refused.value)


def test_comments_and_blank_lines_may_be_anywhere() -> None:
    spaced = SIZES.replace("\n", "\n\n  # a comment\n")
    assert first_difference(parse_graph(SIZES, {}), parse_graph(spaced, {})) is None


WEIGHTED = """gir 1
graph "weights" captured
input %x : f32[2, 3] user
weight @a.{1-4}.b : f32[3]
%0 : f32[2, 3] = aten.add.Tensor(%x, @a.1.b)  #  |
%1 : f32[2, 3] = aten.add.Tensor(%0, @a.2.b)  #  |
%2 : f32[2, 3] = aten.add.Tensor(%1, @a.3.b)  #  |
%3 : f32[2, 3] = aten.add.Tensor(%2, @a.4.b)  #  |
return %3
"""


def made(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def test_a_range_of_weights() -> None:
    graph = parse_graph(WEIGHTED, made)
    assert list(graph.weights) == [f"a.{n}.b" for n in range(1, 5)]
    assert "weight @a.{1-4}.b : f32[3]" in print_graph(graph)
    with pytest.raises(ProgramFormatError, match="no range"):
        parse_graph(WEIGHTED.replace("{1-4}", "{4-4}"), made)
    with pytest.raises(ProgramFormatError, match="no range"):
        parse_graph(WEIGHTED.replace("{1-4}", f"{{1-{parser.MOST_WEIGHTS + 1}}}"), made)
    with pytest.raises(ProgramFormatError, match="a size that is no number"):
        parse_graph(WEIGHTED.replace("f32[3]", "f32[n]", 1), made)


def test_weights_with_a_gap_have_lines_of_their_own() -> None:
    text = WEIGHTED.replace("%2 : f32[2, 3] = aten.add.Tensor(%1, @a.3.b)  #  |\n", "")
    text = text.replace("(%2, @a.4.b)", "(%1, @a.4.b)")
    text = text.replace("weight @a.{1-4}.b", "weight @a.{1-2}.b : f32[3]\nweight @a.4.b")
    written = print_graph(parse_graph(text, made))
    assert [line for line in written.splitlines() if line.startswith("weight")] == [
        f"weight @a.{n}.b : f32[3]" for n in (1, 2, 4)
    ]


def test_numbers_in_a_text_need_not_be_in_order() -> None:
    text = WEIGHTED.replace("%3", "%17")
    graph = parse_graph(text, made)
    assert graph.next_number == 18
    assert "return %17" in print_graph(graph)


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_every_dtype_has_one_name(dtype: torch.dtype) -> None:
    assert DTYPES_BY_NAME[DTYPE_NAMES[dtype]] is dtype
    text = WEIGHTED.split("weight @")[0].replace("f32", DTYPE_NAMES[dtype])
    graph = parse_graph(f"{text}return %x\n", {})
    assert next(iter(graph.nodes)).meta["val"].dtype == dtype


NAMES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32),
    *(torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
    *(torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2),
}


def test_the_dtypes_of_graphs() -> None:
    assert set(DTYPE_NAMES) == NAMES
    assert len(set(DTYPE_NAMES.values())) == len(NAMES)


@pytest.mark.parametrize("name", ["plain.0.weight", "a b", "a|b#c", "ü€😀", " lead", "back\\slash"])
def test_names_in_the_text(name: str) -> None:
    for written in (weight_text(name), comment_text(name)):
        assert plain_name(written) == name
    assert not set(" |#") & set(weight_text(name))
    assert not set("|#") & set(comment_text(name))


# --- limits --------------------------------------------------------------------------------------

HOLDS: dict[str, tuple[int, int]] = {
    # relation -> a size that fulfils it with 8, and one that does not.
    "<=": (8, 9),
    ">=": (8, 7),
    "==": (8, 9),
    "!=": (7, 8),
    "%": (24, 12),
}


@pytest.mark.parametrize("relation", dict.fromkeys((*HOLDS, *limits._HOLDS)))
def test_every_relation(relation: Any) -> None:
    limit = Limit("n", relation, 8, "branch", "m.py:3")
    good, bad = HOLDS[relation]
    assert limit.holds({"n": good})
    assert not limit.holds({"n": bad})
    assert limits.read_limit(limit.line()) == limit
    assert limits.read_limit(limit.line(has_source=False)) == Limit("n", relation, 8, "branch")


EXPRESSIONS: dict[str, int] = {
    "n + m": 13,
    "n - m": 7,
    "n*m": 30,
    "n//m": 3,
    "m**2": 9,
    "-n": -10,
    "Mod(n, m)": 1,
    "Max(n, m)": 10,
    "Min(n, m)": 3,
}


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_every_operator_of_sizes(text: str) -> None:
    sizes = {"n": 10, "m": 3}
    limit = Limit(text, "==", EXPRESSIONS[text])
    assert limits.is_size(text)
    assert limit.holds(sizes)
    assert not Limit(text, "==", EXPRESSIONS[text] + 1).holds(sizes)
    assert limit.names == {name for name in sizes if name in text}
    assert limits.read_limit(limit.line()) == limit


def test_every_operator_has_a_case() -> None:
    assert len(limits._OPERATORS) + len(limits._FUNCTIONS) + 1 == len(EXPRESSIONS)


@pytest.mark.parametrize(
    "text",
    ["n /m", "f(n)", "n.m", "'n'", "n if m else 1", "1.5", "True", "Max(n, key=m)", "n n", ""],
)
def test_what_is_no_size(text: str) -> None:
    assert not limits.is_size(text)
    assert limits.read_limit(f"limit {text} <= 5 op") is None


def test_a_multiple_of_nothing_is_no_limit() -> None:
    assert limits.read_limit("limit n % 0 == 0 op") is None
    assert limits.read_limit("limit n % 1 == 0 op") == Limit("n", "%", 1)
    assert limits.read_limit("limit n < 5 op") is None
    assert limits.read_limit("limit n <= 5 maybe") is None


OF_N = (
    *(Limit("n", ">=", 3), Limit("n", ">=", 5), Limit("n", "<=", 20), Limit("n", "<=", 12)),
    *(Limit("m", ">=", 9), Limit("n*m", "<=", 4), Limit("n", "%", 4)),
)


def test_the_tightest_limits() -> None:
    assert limits.lowest(OF_N, "n") == Limit("n", ">=", 5)
    assert limits.highest(OF_N, "n") == Limit("n", "<=", 12)
    assert limits.highest(OF_N, "m") is None
    assert limits.lowest(OF_N, "k") is None


@pytest.mark.parametrize(
    ("wanted", "found"), [(8, 8), (9, 8), (10, 12), (11, 12), (1, 8), (50, 12), (13, 12)]
)
def test_a_size_that_fits(wanted: int, found: int) -> None:
    assert limits.fitting_size(OF_N, "n", wanted) == found


def test_no_size_fits() -> None:
    impossible = (Limit("n", ">=", 5), Limit("n", "<=", 4))
    assert limits.fitting_size(impossible, "n", 7) == 7
    # Sizes are positive, and limits on several sizes say nothing about one.
    assert limits.fitting_size((Limit("n", "<=", 0),), "n", 3) == 3
    assert limits.fitting_size((Limit("n*m", "<=", 0),), "n", 3) == 3


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        (Limit("n", "<=", 8, "op", "m.py:3"), "the model takes at most 8 at m.py:3"),
        (Limit("n", ">=", 8, "op"), "the model takes at least 8"),
        (Limit("n", "==", 8, "op"), "the model takes n == 8"),
        (Limit("n", "%", 8, "op"), "the model takes n % 8 == 0"),
        (Limit("n*m", "<=", 8, "op"), "the model takes n*m <= 8"),
        (Limit("n", "<=", 8, "branch"), "this program was captured for n <= 8"),
    ],
)
def test_reasons(limit: Limit, reason: str) -> None:
    assert limit.reason().startswith(reason)
    cause = "the model branches on it" if limit.cause == "branch" else "an op needs it"
    place = " at m.py:3" if limit.source else ""
    assert limit.told() == f"{limit} ({cause}{place})"


@pytest.mark.parametrize(
    ("limit", "warning"),
    [
        (Limit("n", "==", 8, "op"), "the program is for n == 8 only, since an op"),
        (Limit("n", "<=", 8, "op"), "the program takes n <= 8, less than"),
        (Limit("n", "==", 8, "branch"), "the program is for n == 8 only: the model branches"),
        (Limit("n", "<=", 8, "branch"), "the program is for n <= 8 only: the model branches"),
    ],
)
def test_warnings(limit: Limit, warning: str) -> None:
    assert limit.narrows().startswith(warning)
