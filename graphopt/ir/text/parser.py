"""Reads `.gir` text back into a Graph.

Shapes are inferred again from the inputs' types and compared with the printed ones, so a text that
was edited wrongly is refused at its line. Only ATen and prims ops, those that graphopt, its plugins
and transformers define, and a closed list of arithmetic on sizes can be named: a text can compute,
and nothing else. White space outside strings, blank lines and lines that are a comment (`# ...`)
may be anywhere.
"""

from __future__ import annotations

import json
import keyword
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx

from graphopt.errors import ProgramFormatError, UnsupportedError, VerifyError
from graphopt.ir.assumptions import KINDS, Assumption, Code
from graphopt.ir.builder import GraphBuilder
from graphopt.ir.graph import Graph, InputKind, InputSpec, graph_module
from graphopt.ir.limits import Limit, read_limit
from graphopt.ir.named_ops import op_named
from graphopt.ir.opset import load_all
from graphopt.ir.shapes import DTYPES_BY_NAME, SymbolicInputs
from graphopt.ir.size_arithmetic import check_operands, check_size, number_of_results
from graphopt.ir.text.history import read_history
from graphopt.ir.text.names import plain_name
from graphopt.ir.text.printer import VERSION, Printer
from graphopt.ir.tokens import Token, read_call
from graphopt.ir.weights import PackedWeight

_CONSTANTS: dict[str, Any] = {
    "None": None,
    "True": True,
    "False": False,
    "float.inf": math.inf,
    "float.minus_inf": -math.inf,
    "float.nan": math.nan,
    "layout.strided": torch.strided,
    **{f"dtype.{name}": dtype for name, dtype in DTYPES_BY_NAME.items()},
    **{f"device.{name}": torch.device(name) for name in ("cpu", "cuda", "meta")},
    **{
        f"memory_format.{name}": getattr(torch, name)
        for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
    },
}
_INPUT = re.compile(r"input\s+%(?P<name>\w+)\s*:\s*(?P<type>\S(?:.*\S)?)\s+(?P<kind>user|cache)")
_WEIGHT = re.compile(
    r"weight\s+@(?P<name>[\w.\\]*)(?:\{(?P<first>[0-9]+)-(?P<last>[0-9]+)\}(?P<tail>[\w.\\]*))?"
    r"\s*:\s*(?P<type>\S.*)"
)
_ASSUME = re.compile(
    r"assume\s+(?P<code>[\w-]+)\s+(?:%(?P<input>\w+)|(?P<text>\"(?:[^\"\\]|\\.)*\"))"
    r"(?:\s*#(?P<layer>[^|]*)(?:\|(?P<source>[^|]*)(?:\|(?P<site>.*))?)?)?"
)
_TYPE = re.compile(r"(?P<dtype>\w+)\s*\[(?P<sizes>.*)\]")
_HALF = re.compile("[\ud800-\udfff]")
_NUMBER = re.compile(r"[0-9]+")
_GRAPH = re.compile(r"graph\s+(?P<name>\"(?:[^\"\\]|\\.)*\")\s+(?P<dialect>captured|serving)")
MOST_WEIGHTS, MOST_SIZES, MOST_LIMITS = 1_000_000, 200, 1_000
MOST_ANCESTORS, MOST_RESULTS = 1_000_000, 100_000
"""Of one text: weights, sizes with a name, limits, names in all histories together; results of one
call. Beyond these a short text would ask for hours, or for all of the memory."""
WeightMaker = Callable[[str, torch.dtype, tuple[int, ...]], Tensor]
"""Makes the data of a weight that the text names: (name, dtype, shape) -> tensor."""


class _Parser:
    def __init__(
        self,
        weights: Mapping[str, Tensor] | WeightMaker,
        packed: Mapping[str, PackedWeight],
        namespaces: Collection[str],
        fake: SymbolicInputs,
        inferred: dict[Any, Any],
    ) -> None:
        self.defined = load_all()
        self.namespaces = namespaces
        self.weights, self.packed = weights, packed
        self.fake = fake
        self.graph = Graph("", graph_module(fx.Graph()), (), {}, dict(packed), inferred=inferred)
        self.builder = GraphBuilder(self.graph, self.fake.mode)
        self.nodes: dict[str, fx.Node] = {}
        self.types: list[tuple[int, fx.Node, str]] = []
        self.inputs: dict[str, InputSpec] = {}
        self.limit_lines: list[tuple[int, Limit]] = []
        self.assumptions: dict[tuple[str, str], Assumption] = {}
        self.ancestors = 0
        self.line = 0

    def fail(self, text: str) -> ProgramFormatError:
        return ProgramFormatError(f"line {self.line} of the graph text: {text}")

    def run(self, text: str) -> Graph:
        half = _HALF.search(text)
        if half is not None:
            raise self.fail(f"{half[0]!r} is half a character, which no file holds")
        lines = text.splitlines()
        handlers: list[tuple[re.Pattern[str], Callable[[re.Match[str]], None]]] = [
            (_INPUT, self._input),
            (_WEIGHT, self._weights),
            (_ASSUME, self._assume),
            (_GRAPH, self._header),
        ]
        is_begun = is_done = False
        for self.line, written in enumerate(lines, start=1):
            line = written.strip()
            if not line or line.startswith("#"):
                continue
            if is_done:
                raise self.fail("text after return")
            if not is_begun:
                if line.split() != ["gir", str(VERSION)]:
                    raise self.fail(f"expected 'gir {VERSION}', found {line[:40]!r}")
                is_begun = True
                continue
            if re.match(r"return\b", line):
                self._return(line.removeprefix("return"))
                is_done = True
                continue
            if line.startswith("%"):
                self._call(line)
                continue
            for pattern, handler in handlers:
                match = pattern.fullmatch(line)
                if match:
                    handler(match)
                    break
            else:
                limit = read_limit(line)
                if limit is not None:
                    self._limit(limit)
                    continue
                raise self.fail(f"not a line of a graph: {line[:60]!r}")
        if not is_done:
            raise self.fail("the text ends before 'return'")
        self.graph.inputs = tuple(self.inputs.values())
        self.graph.limits = tuple(limit for _, limit in self.limit_lines)
        self.graph.assumptions = tuple(self.assumptions.values())
        self.graph.symbols = self.fake.names
        used = [node.meta["number"] for _, node, _ in self.types]
        self.graph.next_number = max(used, default=-1) + 1
        self._check_limits()
        self._check_types()
        return self.graph

    def _header(self, match: re.Match[str]) -> None:
        self.graph.name = json.loads(match["name"])
        self.graph.dialect = cast(Literal["captured", "serving"], match["dialect"])

    def _input(self, match: re.Match[str]) -> None:
        name = match["name"]
        if name in self.inputs:
            raise self.fail(f"input {name!r} is declared twice")
        if not name.isidentifier() or keyword.iskeyword(name):
            raise self.fail(f"input {name!r} has no name that an argument can have")
        dtype, sizes = self._tensor_type(match["type"])
        self.nodes[f"%{name}"] = self.builder.input(name, self.fake.tensor(sizes, dtype))
        self.inputs[name] = InputSpec(name, cast(InputKind, match["kind"]))
        if len(self.fake.names) > MOST_SIZES:
            raise self.fail(f"more than {MOST_SIZES:,} sizes have names")

    def _limit(self, limit: Limit) -> None:
        self.limit_lines.append((self.line, limit))
        if len(self.limit_lines) > MOST_LIMITS:
            raise self.fail(f"more than {MOST_LIMITS:,} limits")
        if limit not in self.fake.limits:
            self.fake.limits = (*self.fake.limits, limit)

    def _check_limits(self) -> None:
        """A serving graph counts token rows; its limits are those of one request."""
        for line, limit in self.limit_lines:
            self.line = line
            unknown = limit.names - set(self.fake.names.values())
            if unknown and self.graph.dialect == "captured":
                raise self.fail(f"limit of {min(unknown)!r}, which is no size of an input")

    def _assume(self, match: re.Match[str]) -> None:
        code, subject = match["code"], match["input"]
        if code not in KINDS:
            raise self.fail(f"unknown assumption {code!r}; there are {', '.join(KINDS)}")
        if subject is None:
            subject = json.loads(match["text"])
        is_input = subject in self.inputs
        if is_input != (KINDS[code].find is not None):
            raise self.fail(f"assumption {code!r} cannot be made of {subject!r}")
        layer, source, site = ((match[name] or "").strip() for name in ("layer", "source", "site"))
        made = Assumption(cast(Code, code), subject, site, plain_name(layer), plain_name(source))
        self.assumptions.setdefault((made.code, made.subject), made)

    def _weights(self, match: re.Match[str]) -> None:
        if match["first"] is None:
            return self._weight(match["name"], match["type"])
        first, last = int(match["first"]), int(match["last"])
        if not first < last < first + MOST_WEIGHTS:
            raise self.fail(f"{first}-{last} is no range")
        for number in range(first, last + 1):
            self._weight(f"{match['name']}{number}{match['tail']}", match["type"])

    def _weight(self, written: str, kind: str) -> None:
        name = plain_name(written)
        if f"@{written}" in self.nodes or name in self.graph.weights:
            raise self.fail(f"weight {name!r} is declared twice")
        if len(self.graph.weights) == MOST_WEIGHTS:
            raise self.fail(f"more than {MOST_WEIGHTS:,} weights")
        dtype, sizes = self._tensor_type(kind)
        if callable(self.weights):
            fixed = tuple(size for size in sizes if isinstance(size, int))
            if len(fixed) != len(sizes):
                raise self.fail(f"weight {name!r} has a size that is no number: {kind}")
            data = self.weights(name, dtype, fixed)
        elif name in self.weights:
            data = self.weights[name]
        else:
            raise self.fail(f"weight {name!r} is not in the weights file")
        if data.dtype != dtype or list(data.shape) != sizes:
            raise self.fail(
                f"weight {name!r} is {data.dtype} {list(data.shape)}, the text says {kind}"
            )
        node = self.builder.weight(name, data, like=[])
        node.meta["history"] = frozenset([f"@{written}"])
        self.nodes[f"@{written}"] = node

    def _call(self, line: str) -> None:
        call = read_call(line)
        if call is None:
            raise self.fail(f"not a line of a graph: {line[:60]!r}")
        if call.number in self.nodes:
            raise self.fail(f"{call.number} is defined twice")
        args, kwargs = self._arguments(call.arguments)
        try:
            target = op_named(call.op, self.defined, self.namespaces)
        except LookupError as error:
            raise self.fail(str(error.args[0])) from None
        try:
            self._check_work(call.op, target, args, kwargs)
            node = self.builder.emit(target, args, kwargs, like=[])
            check_size(node.meta["val"])
        except Exception as error:
            raise self.fail(f"{call.op} does not type-check: {error}") from error
        layer, source, history = call.comment
        node.meta["layer"], node.meta["source"] = plain_name(layer), plain_name(source)
        names = read_history(history, MOST_ANCESTORS)
        self.ancestors += len(names)
        if self.ancestors > MOST_ANCESTORS:
            raise self.fail(f"the histories name more than {MOST_ANCESTORS:,} values")
        node.meta["history"] = names or frozenset([call.number])
        node.meta["number"] = int(call.number.removeprefix("%"))
        self.nodes[call.number] = node
        self.types.append((self.line, node, call.type))

    def _check_work(self, name: str, target: Any, args: Any, kwargs: Any) -> None:
        """Raise ValueError for a call whose result alone would take too much to infer."""
        values, named = fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
        if not isinstance(target, torch._ops.OpOverload):
            check_operands(name.removeprefix("sym."), [*values, *named.values()])
            return
        results = number_of_results(target, values, named)
        if results > MOST_RESULTS:
            raise ValueError(f"it has {results:,} results")

    def _return(self, text: str) -> None:
        outputs = tuple(self._node(name.strip()) for name in text.split(","))
        for node in outputs:
            if not isinstance(node.meta["val"], Tensor):
                raise self.fail("a graph returns tensors")
        output = self.graph.fx_graph.output(outputs)
        output.meta["val"] = None

    def _check_types(self) -> None:
        printer = Printer(self.graph)
        for line, node, written in self.types:
            self.line = line
            try:
                inferred = printer.type(node.meta["val"])
            except VerifyError as error:
                raise self.fail(str(error)) from error
            if "".join(inferred.split()) != "".join(written.split()):
                raise self.fail(f"written as {written[:200]}, but the operands give {inferred}")

    def _node(self, name: str) -> fx.Node:
        if name not in self.nodes:
            raise self.fail(f"{name} is not defined")
        return self.nodes[name]

    def _tensor_type(self, text: str) -> tuple[torch.dtype, list[int | str]]:
        match = _TYPE.fullmatch(text)
        if not match or match["dtype"] not in DTYPES_BY_NAME:
            raise self.fail(f"{text!r} is not a tensor type")
        parts = [part.strip() for part in match["sizes"].split(",") if part.strip()]
        sizes: list[int | str] = []
        for part in parts:
            if _NUMBER.fullmatch(part):
                sizes.append(int(part))
            elif part.isidentifier() and not keyword.iskeyword(part):
                sizes.append(part)
            else:
                raise self.fail(f"size {part!r} of an input is neither a number nor a name")
        return DTYPES_BY_NAME[match["dtype"]], sizes

    def _arguments(self, tokens: Sequence[Token]) -> tuple[list[Any], dict[str, Any]]:
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        position = 0
        while position < len(tokens):
            if position + 1 < len(tokens) and tokens[position + 1] == ("mark", "="):
                key = tokens[position][1]
                if key in kwargs:
                    raise self.fail(f"{key}= is given twice")
                kwargs[key], position = self._value(tokens, position + 2)
            else:
                value, position = self._value(tokens, position)
                args.append(value)
            if position < len(tokens):
                if tokens[position] != ("mark", ","):
                    raise self.fail(f"expected ',' before {tokens[position][1]!r}")
                position += 1
        return args, kwargs

    def _value(self, tokens: Sequence[Token], position: int) -> tuple[Any, int]:
        if position >= len(tokens):
            raise self.fail("an argument is missing")
        kind, text = tokens[position]
        if kind == "string":
            return json.loads(text), position + 1
        if kind == "ref":
            return self._node(text), position + 1
        if kind == "number":
            return (int(text) if text.lstrip("-").isdecimal() else float(text)), position + 1
        if kind == "word" and text in _CONSTANTS:
            return _CONSTANTS[text], position + 1
        if text == "[":
            items: list[Any] = []
            position += 1
            while position < len(tokens) and tokens[position] != ("mark", "]"):
                item, position = self._value(tokens, position)
                items.append(item)
                if position < len(tokens) and tokens[position] == ("mark", ","):
                    position += 1
            if position >= len(tokens):
                raise self.fail("a list is not closed")
            return items, position + 1
        raise self.fail(f"{text!r} is not a value")


def parse_graph(
    text: str,
    weights: Mapping[str, Tensor] | WeightMaker,
    packed: Mapping[str, PackedWeight] | None = None,
    namespaces: Collection[str] = (),
) -> Graph:
    """The graph that `text` describes, reading `weights` by name, or making them.

    namespaces: of torch ops that are allowed although nobody told graphopt of them: those of a
    model's own library, which must be imported.
    Raises ProgramFormatError with the line number for text that is malformed, names unknown ops or
    weights, or does not type-check.
    """
    return GraphReader().read(text, weights, packed, namespaces)


class GraphReader:
    """Reads texts of one model one after the other, as `parse_graph` does.

    What one text's operands give is remembered for the next, in which most lines are the same.
    """

    def __init__(self) -> None:
        self._fake = SymbolicInputs()
        self._inferred: dict[Any, Any] = {}

    def read(
        self,
        text: str,
        weights: Mapping[str, Tensor] | WeightMaker,
        packed: Mapping[str, PackedWeight] | None = None,
        namespaces: Collection[str] = (),
    ) -> Graph:
        """As `parse_graph`; raises what it raises."""
        if isinstance(namespaces, str):
            raise UnsupportedError(f"namespaces={namespaces!r} must be a list: [{namespaces!r}]")
        parser = _Parser(weights, packed or {}, namespaces, self._fake, self._inferred)
        try:
            return parser.run(text)
        # What Python and torch raise for literals, sizes and nestings beyond their limits.
        except (ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError) as error:
            raise parser.fail(f"{type(error).__name__}: {error}") from error
        except VerifyError as error:
            raise parser.fail(str(error)) from error


def first_difference(left: Graph, right: Graph, *, canonical: bool = False) -> str | None:
    """None when both graphs have the same structure (inputs, weights by name, calls, arguments,
    types, provenance, outputs), else the first line that differs, from both.

    canonical: compare what `canonical_text` prints: numbers, source lines and history may differ.
    """
    texts = [Printer(graph, canonical).text().splitlines() for graph in (left, right)]
    for number, (a, b) in enumerate(zip(*texts, strict=False), start=1):
        if a != b:
            return f"line {number}: {a!r} != {b!r}"
    if len(texts[0]) != len(texts[1]):
        return f"{len(texts[0])} lines != {len(texts[1])} lines"
    return None
