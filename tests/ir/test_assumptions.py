"""Assumptions of rewrites: in the text, in words, checked."""

from __future__ import annotations

import pytest
import torch

from graphopt.errors import ProgramFormatError, RequestError
from graphopt.ir.assumptions import KINDS, Assumption, check_assumptions
from graphopt.ir.text.parser import first_difference, parse_graph
from graphopt.ir.text.printer import canonical_text, print_graph

TEXT = """gir 1
graph "assuming" captured
input %ids : i64[2, 3] user
input %mask : i64[2, 3] user
assume zeros-and-ones %mask  # layers.0 | model.py:7 | fuse_attention#0
assume hidden-weighs-nothing "s + -10000.0"  # layers.1 | model.py:8 | fuse_attention#1
%0 : i64[2, 3] = aten.mul.Tensor(%ids, %mask)  #  |
return %0
"""
BITS = Assumption("zeros-and-ones", "mask", "fuse_attention#0", "layers.0", "model.py:7")
HIDDEN = Assumption(
    "hidden-weighs-nothing", "s + -10000.0", "fuse_attention#1", "layers.1", "model.py:8"
)


def test_they_are_read_and_printed() -> None:
    graph = parse_graph(TEXT, {})
    assert graph.assumptions == (BITS, HIDDEN)
    assert first_difference(graph, parse_graph(print_graph(graph), {})) is None
    assert 'assume hidden-weighs-nothing "s + -10000.0"  # layers.1\n' in canonical_text(graph)
    assert "model.py" not in canonical_text(graph)
    bare = parse_graph(TEXT.replace("  # layers.0 | model.py:7 | fuse_attention#0", ""), {})
    assert bare.assumptions[0] == Assumption("zeros-and-ones", "mask")
    assert "assume zeros-and-ones %mask\n" in canonical_text(bare)


def test_each_is_kept_once() -> None:
    graph = parse_graph(TEXT, {})
    graph.assume(Assumption("zeros-and-ones", "mask", "other#3"))
    assert graph.assumptions == (BITS, HIDDEN)
    graph.assume(Assumption("zeros-and-ones", "ids"))
    graph.assume(Assumption("hidden-weighs-nothing", "s + -1.0"))
    assert len(graph.assumptions) == 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("zeros-and-ones", "ones", "unknown assumption 'ones'; there are zeros-and-ones"),
        ("%mask  # l", "%nothing  # l", "cannot be made of 'nothing'"),
        ("zeros-and-ones %mask", 'zeros-and-ones "s"', "cannot be made of 's'"),
        ('"s + -10000.0"', "%mask", "cannot be made of 'mask'"),
        ('"s + -10000.0"', '"mask"', "cannot be made of 'mask'"),
    ],
)
def test_what_cannot_be_assumed(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(ProgramFormatError, match=message):
        parse_graph(TEXT.replace(old, new, 1), {})


@pytest.mark.parametrize(
    ("values", "at"),
    [
        ([[0, 1, 1], [0, 0, 0]], None),
        ([[1, 1, 1], [1, 1, 1]], None),
        ([[0, 1, 2], [3, 0, 0]], [0, 2]),
        ([[0, 1, 1], [0, -1, 0]], [1, 1]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_bits_are_checked(
    values: list[list[int]], at: list[int] | None, dtype: torch.dtype
) -> None:
    ids, mask = torch.full((2, 3), 9), torch.tensor(values).to(dtype)
    given = ((HIDDEN, BITS), ["ids", "mask"], [ids, mask])
    if at is None:
        check_assumptions(*given)
        return
    value = mask[tuple(at)].item()
    with pytest.raises(RequestError) as refused:
        check_assumptions(*given)
    text = str(refused.value)
    assert f"input 'mask' holds {value} at {at}" in text
    assert (
        "mask holds zeros and ones (fuse_attention#0 at model.py:7; checked at each call)" in text
    )
    assert "disable=['fuse_attention']" in text


def test_assumptions_in_words() -> None:
    assert str(HIDDEN).startswith("a key whose score becomes s + -10000.0 weighs nothing beside")
    assert "at" not in str(Assumption("zeros-and-ones", "mask", "p#0")).split("(")[1].split(";")[0]
    assert set(KINDS) == {"zeros-and-ones", "hidden-weighs-nothing"}
    assert KINDS["hidden-weighs-nothing"].find is None
