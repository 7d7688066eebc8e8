"""Reads `.gir` text back into a Graph.

Shapes are inferred again from the inputs' types and compared with the printed ones, so a text that
was edited wrongly is refused at its line. Only ATen and prims ops, those that graphopt, its plugins
and transformers define, and a closed list of arithmetic on sizes can be named: a text can compute,
and nothing else. White space outside strings, blank lines and lines that are a comment (`# ...`)
may be anywhere.
"""

from __future__ import annotations

import importlib
import json
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx

from graphopt.errors import ProgramFormatError, UnsupportedError
from graphopt.ir.assumptions import KINDS, Assumption, Code
from graphopt.ir.builder import GraphBuilder
from graphopt.ir.graph import Graph, InputKind, InputSpec, graph_module
from graphopt.ir.history import read_history
from graphopt.ir.limits import Limit, read_limit
from graphopt.ir.names import plain_name
from graphopt.ir.printer import VERSION, Printer
from graphopt.ir.shapes import DTYPES_BY_NAME, SymbolicInputs
from graphopt.ir.weights import PackedWeight
from graphopt.ops.registry import load_all

SIZE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name)
    for name in (
        "add", "sub", "mul", "floordiv", "mod", "neg", "truediv", "pow", "getitem",
        "eq", "ne", "lt", "le", "gt", "ge",
    )
}  # fmt: skip
SIZE_FUNCTIONS |= {
    name: getattr(torch, name) for name in ("sym_max", "sym_min", "sym_float", "sym_int", "sym_not")
}
SIZE_FUNCTIONS |= {name: getattr(math, name) for name in ("ceil", "floor", "trunc")}
_LIBRARIES = {"transformers": "transformers.integrations.moe"}
"""Namespaces of ops that Hugging Face models are captured with -> the module that defines them."""
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
_TOKEN = re.compile(
    r"\s*(?:(?P<string>\"(?:[^\"\\]|\\.)*\")|(?P<ref>[%@][\w.\\]+)"
    r"|(?P<number>-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)|(?P<word>[A-Za-z_][\w.]*)|(?P<mark>[][(),=]))"
)
_INPUT = re.compile(r"input\s+%(?P<name>\w+)\s*:\s*(?P<type>.+?)\s+(?P<kind>user|cache)")
_WEIGHT = re.compile(
    r"weight\s+@(?P<name>[\w.\\]*)(?:\{(?P<first>\d+)-(?P<last>\d+)\}(?P<tail>[\w.\\]*))?"
    r"\s*:\s*(?P<type>.+)"
)
_CALL = re.compile(
    r"(?P<number>%\d+)\s*:\s*(?P<type>.+?)\s*=\s*(?P<op>[\w.]+)\s*\((?P<args>.*)\)"
    r"(?:\s*#(?P<layer>[^|]*)(?:\|(?P<source>[^|]*)(?:\|(?P<history>.*))?)?)?"
)
_ASSUME = re.compile(
    r"assume\s+(?P<code>[\w-]+)\s+(?:%(?P<input>\w+)|(?P<text>\"(?:[^\"\\]|\\.)*\"))"
    r"(?:\s*#(?P<layer>[^|]*)(?:\|(?P<source>[^|]*)(?:\|(?P<site>.*))?)?)?"
)
_TYPE = re.compile(r"(?P<dtype>\w+)\s*\[(?P<sizes>.*)\]")
_GRAPH = re.compile(r"graph\s+(?P<name>\"(?:[^\"\\]|\\.)*\")\s+(?P<dialect>captured|serving)")
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
        self.namespaces = {"aten", "prims", *_LIBRARIES, *namespaces}
        self.weights, self.packed = weights, packed
        self.fake = fake
        self.graph = Graph("", graph_module(fx.Graph()), (), {}, dict(packed), inferred=inferred)
        self.builder = GraphBuilder(self.graph, self.fake.mode)
        self.nodes: dict[str, fx.Node] = {}
        self.types: list[tuple[int, fx.Node, str]] = []
        self.limit_lines: list[tuple[int, Limit]] = []
        self.line = 0

    def fail(self, text: str) -> ProgramFormatError:
        return ProgramFormatError(f"line {self.line} of the graph text: {text}")

    def run(self, text: str) -> Graph:
        lines = text.splitlines()
        handlers: list[tuple[re.Pattern[str], Callable[[re.Match[str]], None]]] = [
            (_CALL, self._call),
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
            if line.split()[0] == "return":
                self._return(line.removeprefix("return"))
                is_done = True
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
        dtype, sizes = self._tensor_type(match["type"])
        value = self.fake.tensor(sizes, dtype)
        self.nodes[f"%{match['name']}"] = self.builder.input(match["name"], value)
        spec = InputSpec(match["name"], cast(InputKind, match["kind"]))
        self.graph.inputs = (*self.graph.inputs, spec)

    def _limit(self, limit: Limit) -> None:
        self.limit_lines.append((self.line, limit))
        self.graph.limits = (*self.graph.limits, limit)
        self.fake.limits = tuple({**dict.fromkeys(self.fake.limits), limit: None})

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
        is_input = subject in {spec.name for spec in self.graph.inputs}
        if is_input != (KINDS[code].find is not None):
            raise self.fail(f"assumption {code!r} cannot be made of {subject!r}")
        layer, source, site = ((match[name] or "").strip() for name in ("layer", "source", "site"))
        made = Assumption(cast(Code, code), subject, site, plain_name(layer), plain_name(source))
        self.graph.assume(made)

    def _weights(self, match: re.Match[str]) -> None:
        if match["first"] is None:
            return self._weight(match["name"], match["type"])
        first, last = int(match["first"]), int(match["last"])
        if not first < last < first + 100_000:
            raise self.fail(f"{first}-{last} is no range")
        for number in range(first, last + 1):
            self._weight(f"{match['name']}{number}{match['tail']}", match["type"])

    def _weight(self, written: str, kind: str) -> None:
        name = plain_name(written)
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

    def _call(self, match: re.Match[str]) -> None:
        target = self._target(match["op"])
        args, kwargs = self._arguments(match["args"])
        try:
            node = self.builder.emit(target, args, kwargs, like=[])
        except Exception as error:
            raise self.fail(f"{match['op']} does not type-check: {error}") from error
        node.meta["layer"] = plain_name((match["layer"] or "").strip())
        node.meta["source"] = plain_name((match["source"] or "").strip())
        node.meta["history"] = read_history(match["history"] or match["number"])
        if match["number"] in self.nodes:
            raise self.fail(f"{match['number']} is defined twice")
        node.meta["number"] = int(match["number"].removeprefix("%"))
        self.nodes[match["number"]] = node
        self.types.append((self.line, node, match["type"]))

    def _return(self, text: str) -> None:
        outputs = tuple(self._node(name.strip()) for name in text.split(","))
        output = self.graph.fx_graph.output(outputs)
        output.meta["val"] = None

    def _check_types(self) -> None:
        printer = Printer(self.graph)
        for line, node, written in self.types:
            self.line = line
            inferred = printer.type(node.meta["val"])
            if "".join(inferred.split()) != "".join(written.split()):
                raise self.fail(f"written as {written}, but the operands give {inferred}")

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
            if part.isdecimal():
                sizes.append(int(part))
            elif part.isidentifier():
                sizes.append(part)
            else:
                raise self.fail(f"size {part!r} of an input is neither a number nor a name")
        return DTYPES_BY_NAME[match["dtype"]], sizes

    def _target(self, name: str) -> Callable[..., Any]:
        namespace, _, rest = name.partition(".")
        if namespace == "sym" and rest in SIZE_FUNCTIONS:
            return SIZE_FUNCTIONS[rest]
        if name in self.defined:
            return self.defined[name].overload
        known = {defined.partition(".")[0] for defined in self.defined} | {"sym"}
        if namespace not in {*known, *self.namespaces}:
            raise self.fail(
                f"unknown op {name!r}: no installed plugin defines ops of the namespace "
                f"{namespace!r}; there are {', '.join(sorted({*known, *self.namespaces}))}"
            )
        if namespace in _LIBRARIES:
            importlib.import_module(_LIBRARIES[namespace])
        parts = rest.split(".")
        if namespace in self.namespaces and 1 <= len(parts) <= 2:
            packet = getattr(getattr(torch.ops, namespace), parts[0], None)
            op = getattr(packet, parts[1] if len(parts) == 2 else "default", None)
            if isinstance(op, torch._ops.OpOverload):
                return op
        raise self.fail(f"unknown op {name!r}")

    def _arguments(self, text: str) -> tuple[list[Any], dict[str, Any]]:
        tokens = self._tokens(text)
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

    def _tokens(self, text: str) -> list[tuple[str, str]]:
        tokens: list[tuple[str, str]] = []
        position, text = 0, text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None or match.lastgroup is None:
                raise self.fail(f"cannot read {text[position : position + 30]!r}")
            tokens.append((match.lastgroup, match[match.lastgroup]))
            position = match.end()
        return tokens

    def _value(self, tokens: list[tuple[str, str]], position: int) -> tuple[Any, int]:
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
        except (ValueError, TypeError, ArithmeticError, RecursionError, RuntimeError) as error:
            raise parser.fail(f"{type(error).__name__}: {error}") from error


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
