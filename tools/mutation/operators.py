"""The mutants of one Python file, as replacements of text.

    comparison     the sense reversed, or the bound let in or left out
    not, junction  `not` dropped; one operand of and/or dropped
    condition      of if, elif, a conditional expression or a comprehension: True or False
    integer        one more or one less
    arguments      two neighbouring positional ones swapped; the sides of -, /, //, % swapped
    statement      a guard (`if` that leaves), an assignment or a call removed
    function       min/max, any/all, sorted/list exchanged
    element        one left out of a set, dict, list, table, or of the operands of `in`, `is_call`

Docstrings, annotations, messages of exceptions, f-strings and imports are left alone. A weight says
how often a kind is drawn: those that mostly end in a TypeError at once are drawn less.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

REVERSED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
BOUNDARY: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}
EXCHANGED = {"min": "max", "max": "min", "any": "all", "all": "any"}
WEIGHTS = {
    "comparison": 1.0,
    "identity": 0.3,
    "not": 1.0,
    "junction": 1.5,
    "condition": 0.7,
    "integer": 0.7,
    "arguments": 0.3,
    "operands": 1.0,
    "statement": 1.0,
    "function": 1.5,
    "element": 1.0,
}
# Calls whose arguments after the first are a table.
_TABLE_CALLS = {"is_call", "frozenset", "fromkeys"}
_IN_BRACKETS = {"comparison", "identity", "not", "junction", "operands"}
_LEAVES = (ast.Return, ast.Raise, ast.Continue, ast.Break)


@dataclass(frozen=True, slots=True)
class Mutant:
    """Bytes `start:end` of `path` become `text`.

    change: old and new code in words. statement: key of the innermost statement (`statement_key`).
    scope: qualified name of the function, "" at module level. names: what the statement defines.
    """

    path: str
    line: int
    line_text: str
    kind: str
    change: str
    start: int
    end: int
    text: str
    statement: str
    scope: str
    names: tuple[str, ...]

    def apply(self, source: str) -> str:
        """The mutated source."""
        data = source.encode()
        return (data[: self.start] + self.text.encode() + data[self.end :]).decode()


def statement_key(scope: str, statement: ast.stmt) -> str:
    """Names a statement whatever line it is on: its scope and the head of its text."""
    if isinstance(statement, (ast.If, ast.While)):
        head = f"if {ast.unparse(statement.test)}"
    elif isinstance(statement, ast.For):
        head = f"for {ast.unparse(statement.target)} in {ast.unparse(statement.iter)}"
    elif isinstance(statement, ast.With):
        head = "with " + ", ".join(map(ast.unparse, statement.items))
    elif isinstance(statement, (ast.Try, ast.Match)):
        head = type(statement).__name__
    elif isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
        head = f"def {statement.name}"
    else:
        head = ast.unparse(statement)
    return f"{scope}:{head}"


def mutants(path: str, source: str) -> list[Mutant]:
    """Every mutant of a file, in a fixed order. A few do not compile (`is_code`)."""
    found: dict[tuple[int, int, str], Mutant] = {}
    for mutant in _Finder(path, source).all():
        found.setdefault((mutant.start, mutant.end, mutant.text), mutant)
    return list(found.values())


def is_code(mutant: Mutant, source: str) -> bool:
    """False when the mutated source is no Python."""
    try:
        compile(mutant.apply(source), mutant.path, "exec")
    except SyntaxError:
        return False
    return True


class _Finder:
    def __init__(self, path: str, source: str) -> None:
        self.path = path
        self.tree = ast.parse(source)
        self.lines = source.splitlines()
        self.starts = [0]
        for line in source.encode().splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        # Set while a statement is searched.
        self.statement: ast.stmt = ast.Pass()
        self.scope = ""

    def all(self) -> Iterator[Mutant]:
        yield from self._body(self.tree.body, "")

    def _body(self, body: list[ast.stmt], scope: str) -> Iterator[Mutant]:
        for statement in body:
            if isinstance(statement, (ast.Import, ast.ImportFrom)) or _is_text(statement):
                continue
            yield from self._in_statement(statement, body, scope)
            inner = scope
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                inner = f"{scope}.{statement.name}" if scope else statement.name
            for field in ("body", "orelse", "finalbody"):
                yield from self._body(getattr(statement, field, []), inner)
            for handler in getattr(statement, "handlers", []):
                yield from self._body(handler.body, inner)
            for case in getattr(statement, "cases", []):
                yield from self._body(case.body, inner)

    def _in_statement(
        self, statement: ast.stmt, body: list[ast.stmt], scope: str
    ) -> Iterator[Mutant]:
        self.statement, self.scope = statement, scope
        if isinstance(statement, (ast.Raise, ast.Assert)) or _is_alias(statement, scope):
            return
        yield from self._removed(statement, body)
        if isinstance(statement, ast.If):
            yield from self._constants(statement.test)
        for node in _expressions(statement):
            yield from self._of_expression(node, statement)

    def _of_expression(self, node: ast.AST, statement: ast.stmt) -> Iterator[Mutant]:
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            yield from self._comparison(node)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield self._made(node, "not", ast.unparse(node.operand))
        elif isinstance(node, ast.BoolOp):
            word = " and " if isinstance(node.op, ast.And) else " or "
            for i in range(len(node.values)):
                kept = [f"({ast.unparse(v)})" for j, v in enumerate(node.values) if j != i]
                yield self._made(node, "junction", word.join(kept))
        elif isinstance(node, ast.IfExp):
            yield from self._constants(node.test)
        elif isinstance(node, ast.comprehension):
            for test in node.ifs:
                yield from self._constants(test)
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            for value in (node.value + 1, node.value - 1):
                yield self._made(node, "integer", str(value) if value >= 0 else f"({value})")
        elif isinstance(node, ast.BinOp) and isinstance(
            node.op, (ast.Sub, ast.Div, ast.FloorDiv, ast.Mod)
        ):
            swapped = ast.BinOp(node.right, node.op, node.left)
            yield self._made(node, "operands", ast.unparse(swapped))
        elif isinstance(node, ast.Call):
            yield from self._call(node)
        elif isinstance(node, (ast.Set, ast.List, ast.Tuple, ast.Dict)):
            is_table = not self.scope or not isinstance(node, ast.Tuple)
            if is_table and not _is_slots(statement):
                yield from self._elements(node)

    def _comparison(self, node: ast.Compare) -> Iterator[Mutant]:
        operator, right = type(node.ops[0]), node.comparators[0]
        kind = "identity" if operator in (ast.Is, ast.IsNot) else "comparison"
        for table in (REVERSED, BOUNDARY):
            if operator in table:
                changed = ast.Compare(node.left, [table[operator]()], [right])
                yield self._made(node, kind, ast.unparse(changed))
        if operator in (ast.In, ast.NotIn) and isinstance(right, ast.Tuple):
            yield from self._elements(right)

    def _constants(self, test: ast.expr) -> Iterator[Mutant]:
        for value in ("True", "False"):
            if ast.unparse(test) != value:
                yield self._made(test, "condition", value)

    def _call(self, node: ast.Call) -> Iterator[Mutant]:
        name = _called(node)
        if isinstance(node.func, ast.Name) and name in EXCHANGED:
            yield self._made(node.func, "function", EXCHANGED[name])
        args = node.args
        if name in _TABLE_CALLS:
            first = 1 if name == "is_call" else len(args)
            for i in range(first, len(args) if len(args) - first > 1 else 0):
                changed = ast.Call(node.func, args[:i] + args[i + 1 :], node.keywords)
                yield self._made(node, "element", ast.unparse(changed))
            for table in args[:1]:
                if isinstance(table, ast.Tuple) and self.scope:
                    yield from self._elements(table)
            return
        for i in range(len(args) - 1):
            if any(isinstance(a, ast.Starred) for a in args[i : i + 2]):
                continue
            if name == "isinstance" or ast.unparse(args[i]) == ast.unparse(args[i + 1]):
                continue
            swapped = [*args[:i], args[i + 1], args[i], *args[i + 2 :]]
            changed = ast.Call(node.func, swapped, node.keywords)
            yield self._made(node, "arguments", ast.unparse(changed))

    def _elements(self, node: ast.Set | ast.List | ast.Tuple | ast.Dict) -> Iterator[Mutant]:
        count = len(node.keys) if isinstance(node, ast.Dict) else len(node.elts)
        if count < 2 or isinstance(getattr(node, "ctx", None), ast.Store):
            return
        for i in range(count):
            changed: ast.expr
            if isinstance(node, ast.Dict):
                keys, values = node.keys, node.values
                changed = ast.Dict(keys[:i] + keys[i + 1 :], values[:i] + values[i + 1 :])
                left_out = keys[i] or values[i]
            else:
                changed = type(node)(elts=node.elts[:i] + node.elts[i + 1 :])
                left_out = node.elts[i]
            text = ast.unparse(changed)
            yield self._made(node, "element", text, f"without {ast.unparse(left_out)}", left_out)

    def _removed(self, statement: ast.stmt, body: list[ast.stmt]) -> Iterator[Mutant]:
        if isinstance(statement, ast.If) and not statement.orelse:
            if len(statement.body) == 1 and isinstance(statement.body[0], _LEAVES):
                # The same as a condition that is False.
                return
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            yield self._made(statement, "statement", "pass", f"{ast.unparse(statement)} removed")
        elif isinstance(statement, (ast.Assign, ast.AugAssign)) and self.scope:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if all(_stays_bound(t, statement, body) for t in targets):
                yield self._made(
                    statement, "statement", "pass", f"{ast.unparse(statement)} removed"
                )

    def _made(
        self, node: ast.AST, kind: str, text: str, change: str = "", at: ast.AST | None = None
    ) -> Mutant:
        start, end = self._span(node)
        replacement = f"({text})" if kind in _IN_BRACKETS else text
        line: int = getattr(at or node, "lineno", 0)
        old = ast.unparse(node)
        return Mutant(
            self.path,
            line,
            self.lines[line - 1].strip(),
            kind,
            change or f"{old} -> {text}",
            start,
            end,
            replacement,
            statement_key(self.scope, self.statement),
            self.scope,
            _defines(self.statement),
        )

    def _span(self, node: ast.AST) -> tuple[int, int]:
        line, end_line = getattr(node, "lineno", 0), getattr(node, "end_lineno", 0)
        start = self.starts[line - 1] + getattr(node, "col_offset", 0)
        return start, self.starts[end_line - 1] + getattr(node, "end_col_offset", 0)


def _expressions(statement: ast.stmt) -> Iterator[ast.AST]:
    """The expressions of a statement itself, without annotations, defaults, inner statements,
    f-strings, and what a raised error is told."""
    stack: list[ast.AST] = []
    for field, value in ast.iter_fields(statement):
        if field in ("annotation", "returns", "decorator_list", "args", "bases", "keywords"):
            continue
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, ast.AST) and not isinstance(part, (ast.stmt, ast.ExceptHandler)):
                stack.append(part)
    while stack:
        node = stack.pop(0)
        if isinstance(node, (ast.JoinedStr, ast.match_case)):
            continue
        yield node
        stack.extend(ast.iter_child_nodes(node))


def _called(node: ast.Call) -> str:
    if isinstance(node.func, ast.Name):
        return node.func.id
    return node.func.attr if isinstance(node.func, ast.Attribute) else ""


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _is_alias(statement: ast.stmt, scope: str) -> bool:
    """A type under a name: `Maker = Callable[[str], Tensor]`."""
    is_assigned = isinstance(statement, (ast.Assign, ast.AnnAssign)) and not scope
    return is_assigned and isinstance(getattr(statement, "value", None), ast.Subscript)


def _is_slots(statement: ast.stmt) -> bool:
    return any(name in ("__slots__", "__all__") for name in _defines(statement))


def _defines(statement: ast.stmt) -> tuple[str, ...]:
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, (ast.AnnAssign, ast.AugAssign)):
        targets = [statement.target]
    elif isinstance(statement, (ast.For, ast.If)):
        return tuple(n for inner in statement.body for n in _defines(inner))
    names = []
    for target in targets:
        while isinstance(target, (ast.Subscript, ast.Attribute)):
            target = target.value
        if isinstance(target, ast.Name):
            names.append(target.id)
    return tuple(names)


def _stays_bound(target: ast.expr, statement: ast.stmt, body: list[ast.stmt]) -> bool:
    """Whether later reads find something when this assignment is gone: an attribute, an element, a
    name that is assigned before it."""
    if isinstance(target, (ast.Attribute, ast.Subscript)) or isinstance(statement, ast.AugAssign):
        return True
    if not isinstance(target, ast.Name):
        return False
    if isinstance(statement, ast.Assign) and any(
        isinstance(n, ast.Name) and n.id == target.id for n in ast.walk(statement.value)
    ):
        return True
    earlier = body[: body.index(statement)]
    return any(
        isinstance(n, ast.Name) and n.id == target.id and isinstance(n.ctx, ast.Store)
        for other in earlier
        for n in ast.walk(other)
    )
