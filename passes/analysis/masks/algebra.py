"""Index algebra: what an element of a mask is, as a function of where it stands.

An expression is a number, a variable, a linear sum of integer atoms, or a call of a named
operation on expressions. The constructors below normalise as they build, so that two equal masks
usually become equal expressions (and are compared with ==):

    integers   one canonical linear sum; x // c, x % c and min/max stay atoms of it
    booleans   `sum >= 0` is the only comparison of integers besides ==; not is pushed to the
               leaves; and/or are flat, sorted and free of repetitions and complements
    where      is moved outwards past arithmetic with numbers, so that additive masks become a
               tree of conditions over numbers

Variables: b, h, q, k (batch, head, query, key) and sizes by name; all are >= 0, sizes are >= 1.
Elements of tensors that the algebra does not look into are `Read` atoms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Var:
    """A variable; `size`: the name of a size rather than of an index."""

    name: str
    size: bool = False


@dataclass(frozen=True, slots=True)
class Num:
    """A number. True and 1 differ."""

    value: bool | float
    kind: str

    def __bool__(self) -> bool:
        raise TypeError("compare expressions, do not branch on them")


@dataclass(frozen=True, slots=True)
class Sum:
    """constant + sum of coefficient * atom, at least one atom; integers. Atoms sorted by text."""

    terms: tuple[tuple[Expr, int], ...]
    constant: int


@dataclass(frozen=True, slots=True)
class Call:
    """A named operation on expressions."""

    op: str
    args: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Read:
    """The element of tensor `tensor` (a node's name) at `indices`. kind: bool, int or float."""

    tensor: str
    indices: tuple[Expr, ...]
    kind: str


Expr: TypeAlias = Num | Var | Sum | Call | Read

TRUE, FALSE = Num(True, "bool"), Num(False, "bool")
_ORDER = repr


def integer(value: int) -> Num:
    """An integer constant."""
    return Num(int(value), "int")


def real(value: float) -> Num:
    """A floating-point constant."""
    return Num(float(value), "float")


def number(value: bool | float) -> Num:
    """A constant of the value's own kind."""
    kind = "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float"
    return Num(value, kind)


def parts(e: Expr) -> tuple[dict[Expr, int], int]:
    if isinstance(e, Num):
        return {}, int(e.value)
    if isinstance(e, Sum):
        return dict(e.terms), e.constant
    return {e: 1}, 0


def linear(terms: Mapping[Expr, int], constant: int) -> Expr:
    """The canonical form of a linear sum of integer atoms."""
    kept = sorted(((a, c) for a, c in terms.items() if c), key=lambda item: _ORDER(item[0]))
    if not kept:
        return integer(constant)
    if constant == 0 and len(kept) == 1 and kept[0][1] == 1:
        return kept[0][0]
    return Sum(tuple(kept), constant)


def add(x: Expr, y: Expr, factor: int = 1) -> Expr:
    """x + factor * y, integers."""
    terms, constant = parts(x)
    more, other = parts(y)
    for atom, coefficient in more.items():
        terms[atom] = terms.get(atom, 0) + factor * coefficient
    return linear(terms, constant + factor * other)


def times(x: Expr, factor: int) -> Expr:
    """factor * x, integers."""
    return add(integer(0), x, factor)


def floor_divide(x: Expr, divisor: int) -> Expr:
    """x // divisor, divisor > 0. Terms that the divisor divides stand outside of the division."""
    terms, constant = parts(x)
    outside = {a: c // divisor for a, c in terms.items() if c % divisor == 0}
    rest = linear({a: c for a, c in terms.items() if c % divisor}, constant % divisor)
    whole = linear(outside, constant // divisor)
    is_whole = isinstance(rest, Num)
    return whole if is_whole else add(whole, Call("floordiv", (rest, integer(divisor))))


def magnitude(x: Expr) -> Expr:
    """|x|, integers."""
    if isinstance(x, Num):
        return integer(abs(int(x.value)))
    opposite = times(x, -1)
    return Call("magnitude", (min(x, opposite, key=_ORDER),))


def remainder(x: Expr, divisor: int) -> Expr:
    """x - divisor * (x // divisor)."""
    return add(x, floor_divide(x, divisor), -divisor)


def smallest(e: Expr, limits: Mapping[Var, Expr]) -> int | None:
    """A proven lower bound of an integer expression, None when there is none.

    limits: inclusive upper bound of an index variable, itself a sum of sizes.
    """
    terms, constant = parts(e)
    for atom in list(terms):
        if terms[atom] < 0 and isinstance(atom, Var) and atom in limits:
            coefficient = terms.pop(atom)
            terms_more, more = parts(times(limits[atom], coefficient))
            constant += more
            for other, c in terms_more.items():
                terms[other] = terms.get(other, 0) + c
    for atom, coefficient in terms.items():
        low = _lowest_atom(atom, limits)
        if coefficient < 0 or (coefficient > 0 and low is None):
            return None
        constant += coefficient * (low or 0)
    return constant


def _lowest_atom(atom: Expr, limits: Mapping[Var, Expr]) -> int | None:
    if isinstance(atom, Var):
        # A computed size (half of another) may be anything.
        return (1 if atom.name.isidentifier() else None) if atom.size else 0
    if isinstance(atom, Call) and atom.op == "floordiv":
        inner = smallest(atom.args[0], limits)
        divisor = atom.args[1]
        assert isinstance(divisor, Num)
        return None if inner is None else inner // int(divisor.value)
    return None


def at_least_zero(e: Expr) -> Expr:
    """e >= 0 for an integer expression, divided by the common factor of its coefficients."""
    if isinstance(e, Num):
        return number(bool(e.value >= 0))
    whole = next((a for a in parts(e)[0] if isinstance(a, Call) and a.op == "magnitude"), None)
    if whole is not None and abs(parts(e)[0][whole]) == 1:
        coefficient, inner = parts(e)[0][whole], whole.args[0]
        rest = add(e, whole, -coefficient)
        both = at_least_zero(add(rest, inner)), at_least_zero(add(rest, inner, -1))
        return any_of(*both) if coefficient == 1 else all_of(*both)
    if _never_negative(e):
        return TRUE
    if _never_negative(add(integer(-1), e, -1)):
        return FALSE
    terms, constant = parts(e)
    factor = math.gcd(*terms.values())
    if factor > 1:
        e = linear({a: c // factor for a, c in terms.items()}, constant // factor)
    return Call("ge0", (e,))


def _never_negative(e: Expr) -> bool:
    low = smallest(e, {})
    return low is not None and low >= 0


def less_equal(x: Expr, y: Expr) -> Expr:
    """x <= y, integers."""
    return at_least_zero(add(y, x, -1))


def equal(x: Expr, y: Expr) -> Expr:
    """x == y, of integers or of booleans."""
    if x == y:
        return TRUE
    for a, b in ((x, y), (y, x)):
        if isinstance(b, Num) and b.kind == "bool":
            return a if b.value else negate(a)
    if kind_of(x) == "bool" or kind_of(y) == "bool":
        return Call("same", tuple(sorted((x, y), key=_ORDER)))
    difference = add(x, y, -1)
    if isinstance(difference, Num):
        return number(difference.value == 0)
    opposite = times(difference, -1)
    return Call("eq0", (min(difference, opposite, key=_ORDER),))


def negate(e: Expr) -> Expr:
    """not e."""
    if isinstance(e, Num):
        return number(not e.value)
    if isinstance(e, Call):
        if e.op == "not":
            return e.args[0]
        if e.op == "ge0":
            return at_least_zero(add(times(e.args[0], -1), integer(-1)))
        if e.op == "and":
            return any_of(*map(negate, e.args))
        if e.op == "or":
            return all_of(*map(negate, e.args))
    return Call("not", (e,))


def all_of(*parts: Expr) -> Expr:
    """Conjunction."""
    return _junction("and", parts, neutral=TRUE, absorbing=FALSE)


def any_of(*parts: Expr) -> Expr:
    """Disjunction."""
    return _junction("or", parts, neutral=FALSE, absorbing=TRUE)


def _junction(op: str, parts: tuple[Expr, ...], neutral: Num, absorbing: Num) -> Expr:
    flat: list[Expr] = []
    for part in parts:
        flat.extend(part.args if isinstance(part, Call) and part.op == op else (part,))
    bounds = _bounds(op, flat)
    if bounds is None:
        return absorbing
    kept = {part for part in flat if part != neutral and not _is_bound(part)} | bounds
    if absorbing in kept or any(negate(part) in kept for part in kept):
        return absorbing
    # a and (a or c) is a; a or (a and c) is a.
    other = "or" if op == "and" else "and"
    kept = {
        part
        for part in kept
        if not (isinstance(part, Call) and part.op == other and any(a in kept for a in part.args))
    }
    if not kept:
        return neutral
    ordered = tuple(sorted(kept, key=_ORDER))
    return ordered[0] if len(ordered) == 1 else Call(op, ordered)


def _is_bound(e: Expr) -> bool:
    return isinstance(e, Call) and e.op == "ge0"


def _bounds(op: str, flat: Iterable[Expr]) -> set[Expr] | None:
    """The bounds among `flat`, of those on the same sum only the deciding one; None when two of
    them exclude each other (and) or cover everything (or)."""
    constants: dict[Expr, int] = {}
    for part in flat:
        if isinstance(part, Call) and part.op == "ge0":
            terms, constant = parts(part.args[0])
            key = linear(terms, 0)
            decide = min if op == "and" else max
            constants[key] = decide(constants.get(key, constant), constant)
    for key, constant in constants.items():
        opposite = constants.get(times(key, -1))
        if opposite is None:
            continue
        # x + c >= 0 and -x + d >= 0: nothing when c + d < 0; their disjunction: all from -1 on.
        if (op == "and" and constant + opposite < 0) or (op == "or" and constant + opposite >= -1):
            return None
    return {at_least_zero(add(key, integer(c))) for key, c in constants.items()}


def conjuncts(e: Expr) -> tuple[Expr, ...]:
    """The parts of a conjunction."""
    if e == TRUE:
        return ()
    return e.args if isinstance(e, Call) and e.op == "and" else (e,)


# --- everything ----------------------------------------------------------------------------------

_BOOLEAN = {"ge0", "eq0", "same", "not", "and", "or", "lt", "le", "gt", "ge", "eq", "ne"}
_INTEGER = {"floordiv", "magnitude", "int_mul", "int_min", "int_max"}


def kind_of(e: Expr) -> str:
    """bool, int or float."""
    if isinstance(e, (Num, Read)):
        return e.kind
    if isinstance(e, (Var, Sum)):
        return "int"
    if e.op == "where":
        return kind_of(e.args[1])
    return "bool" if e.op in _BOOLEAN else "int" if e.op in _INTEGER else "float"


def choose(condition: Expr, yes: Expr, no: Expr) -> Expr:
    """where(condition, yes, no)."""
    if condition == TRUE or yes == no:
        return yes
    if condition == FALSE:
        return no
    if kind_of(yes) == "bool":
        return any_of(all_of(condition, yes), all_of(negate(condition), no))
    return Call("where", (condition, yes, no))


def over_leaves(e: Expr, function: Callable[[Expr], Expr]) -> Expr:
    """`function` applied to the leaves of a tree of `where`."""
    if isinstance(e, Call) and e.op == "where":
        condition, yes, no = e.args
        return choose(condition, over_leaves(yes, function), over_leaves(no, function))
    return function(e)


def substitute(e: Expr, values: Mapping[Var, Expr]) -> Expr:
    """The expression with variables replaced, normalised again."""
    if isinstance(e, Num):
        return e
    if isinstance(e, Var):
        return values.get(e, e)
    if isinstance(e, Read):
        return Read(e.tensor, tuple(substitute(i, values) for i in e.indices), e.kind)
    if isinstance(e, Sum):
        total: Expr = integer(e.constant)
        for atom, coefficient in e.terms:
            total = add(total, substitute(atom, values), coefficient)
        return total
    return rebuild(e.op, tuple(substitute(a, values) for a in e.args))


def rebuild(op: str, args: tuple[Expr, ...]) -> Expr:
    """A call with new operands, through its normalising constructor."""
    if op == "floordiv":
        assert isinstance(args[1], Num)
        return floor_divide(args[0], int(args[1].value))
    if op == "eq0":
        return equal(args[0], integer(0))
    constructors: dict[str, Callable[..., Expr]] = {
        "magnitude": magnitude,
        "ge0": at_least_zero,
        "same": equal,
        "not": negate,
        "and": all_of,
        "or": any_of,
        "where": choose,
    }
    return constructors[op](*args) if op in constructors else Call(op, args)


def variables(e: Expr) -> frozenset[Var]:
    """Index variables that the expression depends on (sizes left out)."""
    if isinstance(e, Num):
        return frozenset()
    if isinstance(e, Var):
        return frozenset() if e.size else frozenset({e})
    inner = e.indices if isinstance(e, Read) else children(e)
    return frozenset().union(*(variables(child) for child in inner))


def children(e: Sum | Call) -> Iterable[Expr]:
    """The operands of a sum or a call."""
    return e.args if isinstance(e, Call) else (atom for atom, _ in e.terms)


def reads(e: Expr) -> frozenset[Read]:
    """All tensor elements that the expression contains."""
    if isinstance(e, (Num, Var)):
        return frozenset()
    if isinstance(e, Read):
        return frozenset({e}).union(*(reads(i) for i in e.indices))
    return frozenset().union(*(reads(child) for child in children(e)))
