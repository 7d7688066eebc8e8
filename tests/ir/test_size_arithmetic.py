"""Arithmetic on sizes: numbers alone, within 64 bits; and nothing in a text that asks for hours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.errors import ProgramFormatError
from graphopt.ir.graph import Graph
from graphopt.ir.size_arithmetic import check_operands, check_size, number_of_results
from graphopt.ir.text.parser import parse_graph
from graphopt.ir.text.printer import print_graph

HEAD = 'gir 1\ngraph "t" captured\ninput %x : f32[batch, 4] user\n'
TAIL = "%0 : f32[batch, 4] = aten.relu(%x)\nreturn %0\n"
aten = torch.ops.aten


def no_data(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def read(line: str) -> Graph:
    return parse_graph(HEAD + line + "\n" + TAIL, no_data)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%1 : size[1] = sym.pow(10, 1000000000)", "an exponent is at most 64"),
        ("%1 : size[1] = sym.pow(10, 60)", r"a size is at most 2\*\*63 - 1"),
        ('%1 : size[1] = sym.mod("%1000000000d", 1)', "not with '%1000000000d'"),
        ('%1 : size[1] = sym.mul("a", 1000000000)', "not with 'a'"),
        ("%1 : size[1] = sym.mul([1], 1000000000)", "computes with sizes"),
        ("%1 : size[1] = sym.add(None, 1)", "not with NoneType"),
        ("%1 : size[1] = sym.add(%x, 1)", "not with FakeTensor"),
        ("%1 : f32[4] = sym.getitem(%x, 0)", "one of the results of a call"),
        ("%1 : f32[batch, 4] = aten.add.Tensor(%x, " + '"a")', "does not type-check"),
        ("limit 10**10**10 <= 3 op", "not a line of a graph"),
        ("limit batch**9999999999 <= 3 op", "not a line of a graph"),
        ("limit " + "-" * 99_999 + "1 <= 3 op", "not a line of a graph"),
        ("limit " + "(" * 9_000 + "1" + ")" * 9_000 + " <= 3 op", "not a line of a graph"),
        ("input %y : a" + " " * 200_000 + "b", "not a line of a graph"),
        ("limit a" + " " * 200_000 + "b", "not a line of a graph"),
        ("%1 : " + "=a()" * 100_000, "text after the call"),
        ("%1 : a" + " " * 200_000 + "b", "not a line of a graph"),
        ("%1 : f32[4] = aten.unbind.int(%x", "a '\\)' is missing"),
        ("%1 : f32[4] = aten.relu(%x)  # a | b | %0-900000, %1000000-1900000", "more than 1,000,"),
        ("%1 : f32[4] = aten.relu(%x)  # a | b | %" + "9" * 5000, "no value has the number"),
        ("input %x : f32[4] user", "input 'x' is declared twice"),
        ("input %def : f32[4] user", "no name that an argument can have"),
        ("input %5 : f32[4] user", "no name that an argument can have"),
        ("weight @w : f32[4]\nweight @w : f32[4]", "weight 'w' is declared twice"),
        ("weight @w.{3-3} : f32[4]", "3-3 is no range"),
        ("weight @w.{3-2} : f32[4]", "3-2 is no range"),
        ("weight @w.{0-1000001} : f32[4]", "is no range"),
        ("%1 : f32[batch, 4] = aten.relu(%x)  # a | b | c\ud800", "is half a character"),
        ("%007 : f32[batch, 4] = aten.relu(%x)", "not a line of a graph"),
    ],
)
def test_lines_that_are_refused_at_once(line: str, message: str) -> None:
    with pytest.raises(ProgramFormatError, match=message) as error:
        read(line)
    assert str(error.value).startswith("line ")
    assert len(str(error.value)) < 1000


def test_a_call_of_a_thousand_million_results_is_not_made() -> None:
    big = "%1 : f32[1000000000] = aten.full([1000000000], 0.0)\n"
    for call in ("aten.unbind.int(%1)", "aten.split.Tensor(%1, 1)", "aten.chunk(%1, 1000000000)"):
        with pytest.raises(ProgramFormatError, match="has 1,000,000,000 results"):
            read(f"{big}%2 : (f32[]) = {call}")


def test_results_are_counted_beforehand() -> None:
    x = torch.empty(2, 10, device="meta")
    for call, args, count in (
        (aten.unbind.int, (x, 1), 10),
        (aten.unbind.int, (x,), 2),
        (aten.split.Tensor, (x, 4, 1), 3),
        (aten.split.Tensor, (x, 4, -1), 3),
        (aten.chunk.default, (x, 7), 7),
        (aten.split.sizes, (x, [1, 9], 1), 1),
        (aten.relu.default, (x,), 1),
    ):
        assert number_of_results(call, args, {}) == count


def test_what_is_returned_is_a_tensor() -> None:
    text = HEAD + "%1 : size[batch] = aten.sym_size.int(%x, 0)\nreturn %1\n"
    with pytest.raises(ProgramFormatError, match="a graph returns tensors"):
        parse_graph(text, no_data)


@pytest.mark.parametrize(
    ("name", "values"),
    [("pow", (2, 64)), ("pow", (2, 0.5)), ("mul", (2**31, 3)), ("eq", (True, 1)), ("neg", (5,)),
     ("getitem", ((1, 2), 0)), ("truediv", (1.5, 2))],
)  # fmt: skip
def test_numbers_are_fine(name: str, values: tuple[Any, ...]) -> None:
    check_operands(name, values)


def test_the_bound_of_a_size() -> None:
    check_size(2**63 - 1)
    check_size(1e300)
    with pytest.raises(ValueError, match="a size is at most"):
        check_size(-(2**63))


def test_a_line_of_many_weights_makes_one_stand_in() -> None:
    graph = read("weight @w.{0-4999} : f32[4]")
    values = {id(node.meta["val"]) for node in graph.nodes if node.op == "get_attr"}
    assert len(graph.weights) == 5000
    assert len(values) == 1


def test_digits_of_other_scripts_and_halves_of_characters() -> None:
    graph = read("weight @a.1\u0663 : f32[4]")
    assert list(graph.weights) == ["a.1\u0663"]
    text = print_graph(graph)
    assert print_graph(parse_graph(text, no_data)) == text
    half = parse_graph(HEAD + TAIL.replace("(%x)", "(%x)  # a\\u00d800 | b"), no_data)
    print_graph(half).encode()
    assert "a\\u00d800" in print_graph(half)


def test_a_history_names_a_value_once() -> None:
    graph = parse_graph(HEAD + TAIL.replace("(%x)", "(%x)  # | | %5, %05, %7-9, %9-7"), no_data)
    text = print_graph(graph)
    assert "%5, %7-9\n" in text
    assert print_graph(parse_graph(text, no_data)) == text
