"""Golden files: what counts as equal, how a file reads, and how a difference is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from graphopt.check.golden import difference, golden_text, read_golden, read_sections, structure
from graphopt.errors import GoldenError, ProgramFormatError

NORM = """gir 1
graph "Block" captured
input %x : f32[batch, 16] user
weight @weight : f32[16]
%0 : f32[batch, 16] = aten.pow.Tensor_Scalar(%x, 2)
%1 : f32[batch, 1] = aten.mean.dim(%0, [-1], True)
%2 : f32[batch, 16] = aten.mul.Tensor(%1, @weight)  # norm
return %2
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "norm.gir"
    path.write_text(NORM)
    return path


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"%2", "%17"),
        (r"  # norm", "  # another.layer | model.py:3 | %4"),
        (r"  # norm", ""),
        (r"\[batch, 16\]", "[ batch,16 ]"),
        (r" : ", ":"),
        (r", ", " ,   "),
        (r"\n", "  \n\n\t"),
        (r"\Agir 1", "# made by hand\n\ngir   1\n# the graph"),
    ],
)
def test_what_does_not_matter(file: Path, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, NORM)
    assert count, pattern
    (expected,) = read_sections(read_golden(file), file)
    file.write_text(text)
    (found,) = read_sections(read_golden(file), file)
    assert structure(found) == structure(expected)
    assert difference(expected, found, "a", "b") == ""


@pytest.mark.parametrize(
    ("pattern", "replacement", "shown"),
    [
        ("Block", "Other", '+graph "Other" captured'),
        ("%x", "%y", "+input %y : f32[batch, 16] user"),
        ("@weight", "@scale", "+weight @scale : f32[16]"),
        ("f32", "bf16", "+weight @weight : bf16[16]"),
        ("batch", "rows", "+input %x : f32[rows, 16] user"),
        (r"_Scalar\(%x, 2\)", "_Scalar(%x, 3)", "+%0 : f32[batch, 16] = aten.pow"),
        ("return %2", "return %2, %0", "+return %2, %0"),
    ],
)
def test_what_matters(file: Path, pattern: str, replacement: str, shown: str) -> None:
    (expected,) = read_sections(read_golden(file), file)
    file.write_text(re.sub(pattern, replacement, NORM))
    (found,) = read_sections(read_golden(file), file)
    assert structure(found) != structure(expected)
    assert shown in difference(expected, found, "a", "b")


def test_a_call_in_the_middle_is_one_line_of_the_diff(file: Path) -> None:
    (expected,) = read_sections(read_golden(file), file)
    text = NORM.replace("(%0, [-1]", "(%7, [-1]").replace(
        "%1 :", "%7 : f32[batch, 16] = aten.cos(%0)\n%1 :"
    )
    file.write_text(text)
    (found,) = read_sections(read_golden(file), file)
    assert difference(expected, found, "golden", "found").splitlines() == [
        "--- golden",
        "+++ found",
        "@@ outside of all layers @@",
        "-%1 : f32[batch, 1] = aten.mean.dim(%0, [-1], True)",
        "+%3 : f32[batch, 16] = aten.cos(%0)",
        "+%1 : f32[batch, 1] = aten.mean.dim(%3, [-1], True)",
    ]


def test_two_sections(tmp_path: Path) -> None:
    path = tmp_path / "norm.gir"
    path.write_text(golden_text([NORM, NORM.replace("mul", "div")], "fuse_norm"))
    golden = read_golden(path)
    assert golden.pass_name == "fuse_norm"
    before, after = read_sections(golden, path)
    assert before.op_counts()["aten.mul.Tensor"] == after.op_counts()["aten.div.Tensor"] == 1
    assert golden_text(golden.sections, golden.pass_name) == path.read_text()


def test_weights_that_are_not_given_are_random_and_always_the_same(file: Path) -> None:
    first, second = (read_golden(file).graph(0).weights["weight"] for _ in range(2))
    assert torch.equal(first, second)
    assert first.std() > 0
    given = torch.ones(16)
    assert read_golden(file).graph(0, {"weight": given}).weights["weight"] is given


def test_errors_name_the_file_and_its_line(tmp_path: Path) -> None:
    path = tmp_path / "norm.gir"
    broken = NORM.replace("aten.mean.dim", "aten.no_such_op")
    path.write_text(golden_text([NORM, broken], "fuse_norm"))
    line = 1 + path.read_text().splitlines().index(broken.splitlines()[5])
    with pytest.raises(GoldenError, match=rf"norm\.gir: line {line} .*unknown op"):
        read_sections(read_golden(path), path)
    path.write_text(golden_text([broken, NORM], "fuse_norm"))
    with pytest.raises(ProgramFormatError, match="line 6 "):
        read_golden(path).graph(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "before 'return'"),
        (b"\xff\xfe", "cannot be read"),
        (NORM.replace("f32[16]", "f32[batch]").encode(), "line 4 .*no number"),
        (f"{NORM}== after fuse_norm ==\n{NORM}".encode(), "line 9 .*after return"),
        (2 * f"{NORM}=== after x ===\n".encode() + NORM.encode(), "line 18: .*two sections"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "norm.gir"
    path.write_bytes(content)
    with pytest.raises(GoldenError, match=message):
        read_sections(read_golden(path), path)
