"""Mutated graph texts: what reads must print to a text that reads and prints the same, and pass the
verifier or be refused by it.

Seeds: every golden graph, and the graphs of tiny models as each stage prints them. Weights are made
on the meta device, so that a size in a text is a number and no memory.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from graphopt.check.golden import read_golden
from graphopt.errors import ProgramFormatError, VerifyError
from graphopt.ir.graph import Graph
from graphopt.ir.text.parser import GraphReader
from graphopt.ir.text.printer import canonical_text, print_graph
from graphopt.ir.verify import verify

from .harness import WrongError

GOLDEN = Path(__file__).parents[1] / "golden"
_TOKENS = re.compile(r"\"(?:[^\"\\]|\\.)*\"|[%@]?[\w.\\{}]+|\s+|.")
_NUMBERS = ("0", "1", "-1", "2", "3", "64", "65536", "4294967296", "9223372036854775807", "1e308")
_VALUES = (
    *_NUMBERS, "99999999999999999999", "-0.0", "1e-400", "1e400", "float.nan", "float.inf",
    "None", "True", "False", '"x"', '""', '"%1000000000d"', '"\\ud800"', '"aux0[b, k]"',
    "[]", "[1, 2]", "[[]]", "[-1]", "dtype.f16", "dtype.u16", "dtype.c128", "dtype.f8e4m3",
    "device.meta", "device.cuda", "layout.strided", "memory_format.channels_last", "%0", "%1",
)  # fmt: skip
_OPS = (
    "aten.add.Tensor", "aten.mul.Tensor", "aten.relu", "aten.linear", "aten.view",
    "aten.unbind.int",
    "aten.split.Tensor", "aten.cat", "aten.to_sparse", "aten.rand", "aten.nonzero", "aten.sum",
    "aten.full", "aten.empty.memory_format", "aten.embedding", "aten.select.int", "aten.item",
    "aten.add_.Tensor", "aten.sym_size.int", "prims.iota", "graphopt.rms_norm", "graphopt.rope",
    "graphopt.attention", "graphopt.swiglu", "graphopt.kv_write", "graphopt.paged_attention",
    "graphopt.linear_wq", "graphopt.embedding_wq", "graphopt.layer_norm", "graphopt.geglu",
    "sym.add", "sym.mul", "sym.pow", "sym.mod", "sym.floordiv", "sym.getitem", "sym.eq", "sym.neg",
)  # fmt: skip
_LINES = (
    "input %x : f32[batch, 4] user", "input %def : i64[2] cache", "weight @w : f32[4]",
    "weight @w.{0-99} : f32[4]", "weight @w.{3-3} : f32[4]", "weight @w.{9-3} : i64[]",
    "limit batch <= 24 branch", "limit batch**batch <= 3 op  # a.py:1", "limit 2**60 % 8 == 0 op",
    "limit Mod(sequence, 8) == 0 branch", "assume zeros-and-ones %mask  # a | b | c",
    'assume hidden-weighs-nothing "s + -1e4"', "return %0", "return %0, %1", "return", "# note",
    "%900 : size[10] = sym.pow(10, 10)", "%901 : size[1] = sym.pow(10, 1000000000)",
    '%902 : size[1] = sym.mod("%1000000000d", 1)', "%903 : f32[2] = aten.zeros([2])",
    "%904 : f32[1000000000] = aten.zeros([1000000000])", 'graph "other" serving', "gir 1", "gir 2",
)  # fmt: skip


def seed_texts() -> list[str]:
    """Golden graphs before and after, and a tiny model captured, fused and served."""
    from helpers.run_graph import CLEANUP, FUSE, apply
    from helpers.tiny_models import tiny_llama

    from graphopt.capture import capture

    golden = [read_golden(path) for path in sorted(GOLDEN.glob("*.gir"))]
    texts = [section for file in golden for section in file.sections]
    graph = capture(tiny_llama(layers=1))
    texts += [print_graph(graph), canonical_text(graph)]
    apply(graph, *CLEANUP, *FUSE)
    texts.append(print_graph(graph))
    apply(graph, "insert_kv_cache")
    return [*texts, print_graph(graph)]


def no_data(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A weight of the type that the text says."""
    del name
    return torch.empty(shape, dtype=dtype, device="meta")


class Texts:
    """One text, one to four mutations."""

    ci_count = 120

    def __init__(self, folder: Path) -> None:
        del folder
        self._seeds = seed_texts()
        # torch infers shapes at some milliseconds an op: short texts are tried more often.
        self._weights = [1 / (10 + text.count("\n")) for text in self._seeds]
        self._lines = [line for text in self._seeds for line in text.splitlines()]

    def run(self, numbers: random.Random, folder: Path) -> int:
        (text,) = numbers.choices(self._seeds, self._weights)
        for _ in range(numbers.choice((1, 1, 1, 2, 4))):
            text = numbers.choice(MUTATIONS)(text, numbers, self._lines)
        (folder / "graph.gir").write_text(text, encoding="utf-8", errors="surrogatepass")
        check_text(text)
        return 1


def check_text(text: str) -> None:
    """Raises WrongError for a text whose graph prints to something else than itself."""
    reader = GraphReader()
    graph = reader.read(text, no_data)
    printed = print_graph(graph)
    printed.encode()
    try:
        again = reader.read(printed, no_data)
    except ProgramFormatError as error:
        raise WrongError(f"what was printed does not read: {error}\n{printed}") from error
    if print_graph(again) != printed:
        raise WrongError(f"what was printed reads as something else:\n{printed}")
    canonical = canonical_text(graph)
    if canonical_text(reader.read(canonical, no_data)) != canonical:
        raise WrongError(f"the canonical text reads as something else:\n{canonical}")
    # The copy is what passes work on.
    if print_graph(graph.copy()) != printed:
        raise WrongError("a copy prints something else")
    refused = [_refusal(g) for g in (graph, again)]
    if bool(refused[0]) != bool(refused[1]):
        raise WrongError(f"the verifier says {refused[0]!r}, then {refused[1]!r}\n{printed}")
    if refused[0]:
        raise VerifyError(refused[0])


def _refusal(graph: Graph) -> str:
    try:
        verify(graph)
    except VerifyError as error:
        return str(error)
    return ""


Mutation = Callable[[str, random.Random, list[str]], str]


def _on_lines(change: Callable[[list[str], random.Random, list[str]], None]) -> Mutation:
    def mutate(text: str, numbers: random.Random, others: list[str]) -> str:
        lines = text.splitlines() or [""]
        change(lines, numbers, others)
        return "\n".join([*lines, ""])

    return mutate


def _at(lines: list[str], numbers: random.Random) -> int:
    return numbers.randrange(len(lines))


def _drop(lines: list[str], numbers: random.Random, others: list[str]) -> None:
    del lines[_at(lines, numbers)]


def _double(lines: list[str], numbers: random.Random, others: list[str]) -> None:
    lines.insert(_at(lines, numbers), lines[_at(lines, numbers)])


def _swap(lines: list[str], numbers: random.Random, others: list[str]) -> None:
    a, b = _at(lines, numbers), _at(lines, numbers)
    lines[a], lines[b] = lines[b], lines[a]


def _foreign(lines: list[str], numbers: random.Random, others: list[str]) -> None:
    lines.insert(_at(lines, numbers), numbers.choice(numbers.choice((others, list(_LINES)))))


def _cut(lines: list[str], numbers: random.Random, others: list[str]) -> None:
    at = _at(lines, numbers)
    lines[at] = lines[at][: numbers.randrange(len(lines[at]) + 1)]


def _blow_up(lines: list[str], numbers: random.Random, others: list[str]) -> None:
    """One part of a line many times over."""
    at = _at(lines, numbers)
    tokens = _TOKENS.findall(lines[at]) or [" "]
    place = numbers.randrange(len(tokens))
    tokens[place] *= numbers.choice((3, 50, 3000))
    lines[at] = "".join(tokens)


def _token(lines: list[str], numbers: random.Random, others: list[str]) -> None:
    """One token becomes another value, number, op or token of the text, or goes."""
    at = _at(lines, numbers)
    tokens = _TOKENS.findall(lines[at])
    if not tokens:
        return
    place = numbers.randrange(len(tokens))
    found = tokens[place]
    kind = numbers.randrange(5)
    if kind == 0 or re.fullmatch(r"-?[\d.e+-]+|True|False|None|\"[^\"]*\"", found):
        tokens[place] = numbers.choice(_VALUES)
    elif re.fullmatch(r"(aten|graphopt|sym|prims)\.[\w.]+", found) and kind < 4:
        tokens[place] = numbers.choice(_OPS)
    elif kind == 1:
        tokens[place] = ""
    elif kind == 2:
        tokens[place] = chr(
            numbers.choice((0, 0x1F, 0x7F, 0x85, 0x2028, 0x663, 0xFF10, 0xD800, 39))
        )
    else:
        other = _TOKENS.findall(numbers.choice(others)) or [" "]
        tokens[place] = numbers.choice(other)
    lines[at] = "".join(tokens)


def _number(lines: list[str], numbers: random.Random, others: list[str]) -> None:
    """One number of one line becomes another."""
    at = _at(lines, numbers)
    found = list(re.finditer(r"\d+", lines[at]))
    if found:
        match = numbers.choice(found)
        new = numbers.choice((*_NUMBERS, str(int(match[0]) + 1), "0" + match[0]))
        lines[at] = lines[at][: match.start()] + new + lines[at][match.end() :]


MUTATIONS: tuple[Mutation, ...] = tuple(
    _on_lines(change)
    for change in (_token, _token, _token, _number, _number, _drop, _double, _swap, _foreign, _cut,
                   _blow_up)
)  # fmt: skip
FUZZER = Texts
