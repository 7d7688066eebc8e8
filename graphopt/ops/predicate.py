"""The little language of the attention op's `predicate`, `bias` and `hidden` attributes.

Python expressions over these names, evaluated for every (batch, head, query, key):

    b h q k     indices; q is the query's position among the keys (row + T - S)
    S T         numbers of queries and of keys
    aux0 ...    tensors that the op is given, indexed: aux0[b, k]
    inf         infinity
    s mask      in `hidden` only: the score, and the mask's element

with + - * / // %, comparisons, and or not, and the functions where(c, x, y), float(x), abs(x),
min(x, y), max(x, y), and bf16(x) and f16(x), which round to that type.
Anything else is a UnsupportedError: the text is never given to Python itself.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import UnsupportedError

_BINARY: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.LtE: operator.le,
    ast.Lt: operator.lt,
    ast.GtE: operator.ge,
    ast.Gt: operator.gt,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def _tensor(value: Any) -> Tensor:
    """A number in float64, so that the limits of every type stay what they are."""
    dtype = torch.float64 if isinstance(value, float) else None
    return torch.as_tensor(value, dtype=dtype)


def _where(condition: Any, yes: Any, no: Any) -> Any:
    return torch.where(torch.as_tensor(condition), _tensor(yes), _tensor(no))


def _rounding(dtype: torch.dtype) -> Callable[[Any], Tensor]:
    return lambda x: _tensor(x).to(dtype)


_INDICES = frozenset({"b", "h", "q", "k", "S", "T", "inf"})
_ARGUMENTS = {"where": 3, "min": 2, "max": 2}
_LONGEST = 100_000
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "where": _where,
    "float": lambda x: torch.as_tensor(x).to(torch.float32),
    "abs": abs,
    "min": lambda x, y: torch.minimum(_tensor(x), _tensor(y)),
    "max": lambda x, y: torch.maximum(_tensor(x), _tensor(y)),
    "bf16": _rounding(torch.bfloat16),
    "f16": _rounding(torch.float16),
}


@functools.lru_cache(maxsize=256)
def parse(text: str) -> ast.expr:
    """The syntax tree. Raises UnsupportedError for text that is not an expression."""
    try:
        if len(text) > _LONGEST:
            raise ValueError(f"it has {len(text):,} characters, more than {_LONGEST:,}")
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UnsupportedError(f"predicate {text[:200]!r} is no expression: {error}") from error


@functools.lru_cache(maxsize=256)
def check(text: str, tensors: int, more: frozenset[str]) -> None:
    """Raise UnsupportedError for a text that has no meaning with `tensors` tensors aux0, aux1, ...
    and the names `more` beside the indices."""
    known = _INDICES | more | {f"aux{number}" for number in range(tensors)}
    tree = parse(text)
    try:
        unknown = next((node for node in _parts(tree) if not _is_legal(node, known)), None)
    except RecursionError:
        unknown = tree
    if unknown is not None:
        raise _meaningless(text, unknown)


def _parts(node: ast.expr) -> Iterator[ast.expr]:
    """The node and every operand below it, names of functions aside."""
    yield node
    if isinstance(node, ast.BinOp):
        below = [node.left, node.right]
    elif isinstance(node, ast.Compare):
        below = [node.left, *node.comparators]
    elif isinstance(node, ast.UnaryOp):
        below = [node.operand]
    elif isinstance(node, ast.BoolOp):
        below = node.values
    elif isinstance(node, ast.Subscript):
        below = [*(node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice])]
    elif isinstance(node, ast.Call):
        below = node.args
    else:
        below = []
    for part in below:
        yield from _parts(part)


def _is_legal(node: ast.expr, names: AbstractSet[str]) -> bool:
    """Whether `_value` computes a node of this kind, its operands aside."""
    if isinstance(node, ast.Constant):
        value = node.value
        return isinstance(value, float) or (isinstance(value, int) and value < 2**63)
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.BinOp):
        return type(node.op) in _BINARY
    if isinstance(node, ast.Compare):
        return len(node.ops) == 1 and type(node.ops[0]) in _BINARY
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, (ast.USub, ast.Not))
    if isinstance(node, ast.Subscript):
        return isinstance(node.value, ast.Name) and node.value.id in names - _INDICES
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        wanted = _ARGUMENTS.get(node.func.id, 1)
        return node.func.id in _FUNCTIONS and len(node.args) == wanted
    return isinstance(node, ast.BoolOp)


def _meaningless(text: str, node: ast.expr) -> UnsupportedError:
    try:
        part = ast.unparse(node)
    except RecursionError:
        part = text
    return UnsupportedError(
        f"predicate {text[:200]!r} holds {part[:200]!r}, which has no meaning here"
    )


def highest(text: str, name: str) -> tuple[float, bool] | None:
    """The largest number that `text` may be, or that it adds to `name`, and whether it does; None
    where this cannot be told."""
    found = _highest(parse(text), name)
    is_added = any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(parse(text)))
    return None if found is None else (found, is_added)


def _highest(node: ast.expr, name: str) -> float | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return float(node.value)
    if isinstance(node, ast.Name):
        return {name: 0.0, "inf": math.inf}.get(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        is_number = isinstance(node.operand, ast.Constant) or ast.unparse(node.operand) == "inf"
        low = _highest(node.operand, name) if is_number else None
        return None if low is None else -low
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [_highest(side, name) for side in (node.left, node.right)]
        return None if None in parts else sum(p for p in parts if p is not None)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id in ("bf16", "f16"):
            return _highest(node.args[0], name)
        if node.func.id == "where":
            yes, no = (_highest(side, name) for side in node.args[1:])
            return None if yes is None or no is None else max(yes, no)
    return None


@functools.lru_cache(maxsize=256)
def added_to(name: str, text: str) -> str | None:
    """x of `name + x`, where x does not hold the name; None of other texts."""
    tree = parse(text) if text else None
    if not isinstance(tree, ast.BinOp) or not isinstance(tree.op, (ast.Add, ast.Sub)):
        return None
    inner = [node.id for node in ast.walk(tree.right) if isinstance(node, ast.Name)]
    if not isinstance(tree.left, ast.Name) or tree.left.id != name or name in inner:
        return None
    added = tree.right
    return ast.unparse(ast.UnaryOp(ast.USub(), added) if isinstance(tree.op, ast.Sub) else added)


def evaluate(
    text: str,
    sizes: tuple[int, int, int, int],
    aux: Sequence[Tensor],
    rows: range,
    device: Any,
    more: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Values of `text`, broadcastable to `[B, H, len(rows), T]`.

    sizes: B, H, S, T. rows: the queries wanted. more: further names. Raises UnsupportedError for
    unknown names and syntax.
    """
    batch, heads, queries, keys = sizes
    first = rows.start + keys - queries
    names: dict[str, Any] = {
        "b": torch.arange(batch, device=device).view(-1, 1, 1, 1),
        "h": torch.arange(heads, device=device).view(1, -1, 1, 1),
        "q": torch.arange(first, first + len(rows), device=device).view(1, 1, -1, 1),
        "k": torch.arange(keys, device=device),
        "S": queries,
        "T": keys,
        "inf": math.inf,
        **(more or {}),
        **{f"aux{i}": tensor for i, tensor in enumerate(aux)},
    }
    return _tensor(_value(parse(text), names, text)).to(device)


def _value(node: ast.expr, names: Mapping[str, Any], text: str) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = (_value(side, names, text) for side in (node.left, node.right))
        return _BINARY[type(node.op)](left, right)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _BINARY:
        left, right = (_value(side, names, text) for side in (node.left, node.comparators[0]))
        return _BINARY[type(node.ops[0])](left, right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, names, text)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return torch.logical_not(torch.as_tensor(_value(node.operand, names, text)))
    if isinstance(node, ast.BoolOp):
        values = [torch.as_tensor(_value(v, names, text)).bool() for v in node.values]
        combine = operator.and_ if isinstance(node.op, ast.And) else operator.or_
        return functools.reduce(combine, values)
    if isinstance(node, ast.Subscript):
        index = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        at = tuple(_value(i, names, text) for i in index)
        return _value(node.value, names, text)[at]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        function = _FUNCTIONS.get(node.func.id)
        if function is not None and not node.keywords:
            return function(*(_value(a, names, text) for a in node.args))
    raise _meaningless(text, node)
