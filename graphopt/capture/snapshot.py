"""What hangs on a module, by identity, and the way back to it.

A `Snapshot` holds the attributes of every submodule (parameters, buffers, hooks and modes are
attributes), the containers and plain objects behind them, the class attributes and file globals
that hold tensors or numbers, what functions of the model keep, and, where asked, the contents of
small tensors that are no parameters. Weights are never copied: they are compared by identity.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

LARGEST_COPY = 2**20
"""Elements of the largest tensor, no parameter, whose contents are kept."""

_ATOMS = (
    *(str, bytes, int, float, complex, type(None), Enum, types.ModuleType, types.MethodType),
    *(torch.dtype, torch.device, torch.Size, torch.SymInt, torch.SymFloat, torch.SymBool),
)
_NUMBERS = (int, float, complex, torch.SymInt, torch.SymFloat)
_SLOT = types.MemberDescriptorType
_MISSING = object()


@dataclass(frozen=True, slots=True)
class Change:
    """One attribute or item that was rebound. path: where it is ("layers.0.cos"); before, after:
    what it was and became, a private marker where it was not there."""

    path: str
    before: Any
    after: Any

    @property
    def is_state(self) -> bool:
        """Whether a later call could compute something else because of it: a tensor or a number,
        also within containers, that was not there before."""
        if isinstance(self.before, _NUMBERS) and type(self.before) is type(self.after):
            return bool(self.before != self.after)
        return any(_holds(value, (Tensor, *_NUMBERS)) for value in (self.before, self.after))


class Snapshot:
    """The state of `root` and of what it reaches.

    with_contents: also what tensors hold, their versions and whether they ask for gradients.
    """

    def __init__(self, root: nn.Module, with_contents: bool = False) -> None:
        # Values are kept, so that no other object gets the address of one.
        self._seen: dict[int, Any] = {}
        self._holders: list[tuple[str, Any, Any]] = []
        self._scopes: list[tuple[_Scope, dict[str, Any]]] = []
        self._tensors: list[_TensorState] = []
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        self._caches: list[tuple[Any, int]] = []
        self._with_contents = with_contents
        self._walk(root)

    def restore(self) -> list[Change]:
        """Put everything back; what had been rebound on the module and on what hangs on it."""
        changes: list[Change] = []
        for path, holder, before in self._holders:
            now = _contents(holder)
            if not _same(before, now):
                changes += _differences(path, before, now)
                _refill(holder, before)
        for scope, names in self._scopes:
            changes += scope.restore(names)
        for tensor in self._tensors:
            tensor.restore()
        for generator, state in self._generators:
            generator.set_state(state)
        for cache, misses in self._caches:
            # What fell in while tracing cannot be told from what was there.
            if cache.cache_info().misses != misses:
                cache.cache_clear()
        return changes

    def _walk(self, root: nn.Module) -> None:
        todo: list[tuple[str, Any]] = [("", root)]
        while todo:
            path, value = todo.pop()
            if isinstance(value, _ATOMS) or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            if isinstance(value, Tensor):
                if self._with_contents:
                    self._tensors.append(_TensorState(value))
            elif isinstance(value, torch.Generator):
                self._generators.append((value, value.get_state()))
            elif isinstance(value, tuple):
                todo += [(f"{path}[{i}]", item) for i, item in enumerate(value)]
            elif _is_cache(value):
                self._caches.append((value, value.cache_info().misses))
            elif isinstance(value, types.FunctionType):
                todo += self._kept_by(path, value)
            elif not isinstance(value, (type, types.BuiltinFunctionType)):
                todo += self._inside(path, value)

    def _kept_by(self, path: str, function: types.FunctionType) -> list[tuple[str, Any]]:
        """Note what a function of the model keeps: attributes, defaults, variables around it."""
        if _is_library(str(function.__module__)):
            return []
        inside: list[tuple[str, Any]] = []
        for holder in (function.__dict__, _Closure(function)):
            before = _contents(holder)
            self._holders.append((path, holder, before))
            inside += _items(path, before)
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        inside += [(path, value) for value in defaults]
        # Objects behind a function (a test tool's, a decorator's) have lives of their own.
        kinds = (dict, list, set, deque, Tensor, types.FunctionType)
        return [(name, value) for name, value in inside if isinstance(value, kinds)]

    def _inside(self, path: str, value: Any) -> list[tuple[str, Any]]:
        """Note a container or an object; what is in it."""
        inside: list[tuple[str, Any]] = []
        contents = _contents(value)
        if contents is not None:
            self._holders.append((path, value, contents))
            inside += _items(path, contents)
        if _is_of_python(type(value)):
            return inside
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._seen[id(attributes)] = attributes
            before = dict(attributes)
            self._holders.append((path, attributes, before))
            inside += _attributes(path, value, before)
        slots = _Slots(value)
        if slots.names:
            before = slots.read()
            self._holders.append((path, slots, before))
            inside += _attributes(path, value, before)
        if slots.names or isinstance(attributes, dict):
            inside += self._scopes_of(type(value))
        return inside

    def _scopes_of(self, kind: type) -> list[tuple[str, Any]]:
        """Note the attributes of a class and the globals of its file; the containers in them."""
        inside: list[tuple[str, Any]] = []
        owners: list[Any] = [cls for cls in kind.__mro__ if not _is_library(cls.__module__)]
        for cls in tuple(owners):
            file = sys.modules.get(cls.__module__)
            if file is None or id(file) in self._seen:
                continue
            # The files that its functions come from may keep tables too.
            functions = (v for v in vars(file).values() if isinstance(v, types.FunctionType))
            names = {cls.__module__, *(str(function.__module__) for function in functions)}
            owners += [sys.modules[name] for name in names if name in sys.modules]
        for owner in owners:
            if id(owner) in self._seen or _is_library(getattr(owner, "__module__", owner.__name__)):
                continue
            self._seen[id(owner)] = owner
            held = dict(vars(owner))
            self._scopes.append((_Scope(owner), held))
            for name, value in held.items():
                is_container = type(value) in (dict, list, set, OrderedDict, deque)
                is_function = isinstance(value, types.FunctionType)
                if is_container or is_function or isinstance(value, Tensor) or _is_cache(value):
                    inside.append((f"{owner.__name__}.{name}", value))
        return inside


class _Slots:
    """The attributes of an object that have no dict behind them."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        found = [vars(cls).get("__slots__", ()) for cls in type(owner).__mro__]
        names = {name for slots in found for name in ([slots] if isinstance(slots, str) else slots)}
        # Private names are mangled, and a C type's slots are no attributes: ask the type.
        self.names = sorted(
            name
            for name in names
            if isinstance(inspect.getattr_static(type(owner), name, None), _SLOT)
        )

    def read(self) -> dict[str, Any]:
        values = {name: getattr(self._owner, name, _MISSING) for name in self.names}
        return {name: value for name, value in values.items() if value is not _MISSING}

    def write(self, before: dict[str, Any]) -> None:
        for name, value in before.items():
            object.__setattr__(self._owner, name, value)
        for name in set(self.read()) - set(before):
            object.__delattr__(self._owner, name)


class _Closure:
    """The variables of an enclosing function that a function can rebind."""

    def __init__(self, function: types.FunctionType) -> None:
        names = function.__code__.co_freevars
        self._cells = dict(zip(names, function.__closure__ or (), strict=True))

    def read(self) -> dict[str, Any]:
        values = {}
        for name, cell in self._cells.items():
            with contextlib.suppress(ValueError):  # not assigned yet
                values[name] = cell.cell_contents
        return values

    def write(self, before: dict[str, Any]) -> None:
        for name, value in before.items():
            self._cells[name].cell_contents = value


class _Scope:
    """A class or a file. Other threads and lazy imports write there too, so only names that came
    to hold tensors or other numbers are put back."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    def restore(self, before: dict[str, Any]) -> list[Change]:
        changes: list[Change] = []
        for name, value in list(vars(self._owner).items()):
            was = before.get(name, _MISSING)
            is_counted = isinstance(was, _NUMBERS) and isinstance(value, _NUMBERS)
            is_ours = is_counted or _holds(value, (Tensor, torch.SymInt))
            if value is was or not is_ours:
                continue
            changes.append(Change(f"{self._owner.__name__}.{name}", was, value))
            if name in before:
                setattr(self._owner, name, before[name])
            else:
                delattr(self._owner, name)
        return changes


class _TensorState:
    """A tensor's flags, and its contents where they are small and no weight."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._requires_grad = tensor.requires_grad
        self._version = _version(tensor)
        is_small = tensor.numel() <= LARGEST_COPY and not isinstance(tensor, nn.Parameter)
        has_data = tensor.device.type != "meta" and type(tensor) is Tensor
        self._copy = tensor.detach().clone() if is_small and has_data else None

    def restore(self) -> None:
        if self._tensor.is_leaf and self._tensor.requires_grad != self._requires_grad:
            self._tensor.requires_grad_(self._requires_grad)
        if self._copy is not None and _version(self._tensor) != self._version:
            with torch.no_grad():
                self._tensor.copy_(self._copy)


def _version(tensor: Tensor) -> int:
    # Inference tensors do not count; they cannot be written to outside inference mode either.
    return -1 if tensor.is_inference() else tensor._version


def _is_cache(value: Any) -> bool:
    return isinstance(value, functools._lru_cache_wrapper)


def _is_library(module: str) -> bool:
    package = module.partition(".")[0]
    if package == "transformers":
        return not module.startswith("transformers.models.")
    return package in ("torch", "numpy", "graphopt") or package in sys.stdlib_module_names


def _is_of_python(kind: type) -> bool:
    """Whether it is a logger, a thread, a file and the like, which live beside the model."""
    package = kind.__module__.partition(".")[0]
    return package in sys.stdlib_module_names and kind is not types.SimpleNamespace


def _contents(value: Any) -> Any:
    """A shallow copy of what a container holds; None for anything else."""
    if isinstance(value, (_Slots, _Closure)):
        return value.read()
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, deque)):
        return list(value)
    if isinstance(value, set):
        return set(value)
    return None


_MEMBERS = ("_parameters", "_buffers", "_modules")


def _items(path: str, contents: Any) -> list[tuple[str, Any]]:
    pairs = contents.items() if isinstance(contents, dict) else enumerate(contents)
    return [(_join(path, key), value) for key, value in pairs]


def _attributes(path: str, owner: Any, attributes: dict[str, Any]) -> list[tuple[str, Any]]:
    """The attributes' values with their paths; those of parameters, buffers and submodules."""
    is_module = isinstance(owner, nn.Module)
    return [
        (path if is_module and name in _MEMBERS else _join(path, name), value)
        for name, value in attributes.items()
    ]


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, dict):
        return len(before) == len(now) and all(
            a is b and v is w for (a, v), (b, w) in zip(before.items(), now.items(), strict=True)
        )
    if isinstance(before, list):
        return len(before) == len(now) and all(map(_is, before, now))
    return {id(item) for item in before} == {id(item) for item in now}


def _is(a: Any, b: Any) -> bool:
    return a is b


def _differences(path: str, before: Any, now: Any) -> list[Change]:
    if isinstance(before, set):
        return [Change(path, before, now)]
    if isinstance(before, list):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    return [
        Change(_join(path, key), before.get(key, _MISSING), now.get(key, _MISSING))
        for key in {**before, **now}
        if before.get(key, _MISSING) is not now.get(key, _MISSING)
    ]


def _refill(holder: Any, contents: Any) -> None:
    if isinstance(holder, (_Slots, _Closure)):
        holder.write(contents)
        return
    holder.clear()
    if isinstance(holder, (dict, set)):
        holder.update(contents)
    else:
        holder.extend(contents)


def _holds(value: Any, kinds: tuple[type, ...], depth: int = 4) -> bool:
    """Whether it is one of `kinds` (a bool is no number), or a container with one."""
    if isinstance(value, kinds):
        return not isinstance(value, bool)
    if not depth:
        return False
    inside: Iterable[Any] = ()
    if isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, (list, tuple, set, deque)):
        inside = value
    return any(_holds(item, kinds, depth - 1) for item in inside)
