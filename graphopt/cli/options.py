"""Options that several commands share, and what their texts mean."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints

import typer

from graphopt.errors import UnsupportedError

Model = Annotated[str, typer.Argument(help="model name, folder, .gguf file, or saved program")]
Weights = Annotated[
    str | None,
    typer.Option(
        help="packed: keep the low-bit weights of a GGUF file (its default); dense: expand them",
        show_default=False,
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help="float32 (the default) or bfloat16", show_default=False)
]
Activations = Annotated[
    str | None,
    typer.Option(help="float (the default), or int8 for faster low-bit layers", show_default=False),
]
Backend = Annotated[
    str | None,
    typer.Option(
        help="cpu or reference; default: cpu, or what the program was saved for",
        show_default=False,
    ),
]
Disable = Annotated[
    list[str] | None, typer.Option(help="a pass to leave out; can be repeated", show_default=False)
]
Enable = Annotated[
    list[str] | None,
    typer.Option(help="a pass to run as well; can be repeated", show_default=False),
]
Limit = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PASS=N",
        help="at most N rewrites of a pass, such as fuse_attention=7; can be repeated",
        show_default=False,
    ),
]
Check = Annotated[
    str | None,
    typer.Option(help="numerics: hold every pass to its tier", show_default=False),
]


def limits_in(texts: Iterable[str] | None) -> dict[str, int]:
    """`["fuse_attention=7"]` -> `{"fuse_attention": 7}`. Raises UnsupportedError."""
    limits: dict[str, int] = {}
    for text in texts or ():
        name, mark, count = text.partition("=")
        if not mark or not count.isdecimal():
            raise UnsupportedError(f"--limit {text!r} must be PASS=N, such as fuse_attention=7")
        if name in limits:
            raise UnsupportedError(f"--limit names {name!r} twice")
        limits[name] = int(count)
    return limits


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How a model is loaded and run; None: not said."""

    weights: Weights = None
    dtype: Dtype = None
    activations: Activations = None
    backend: Backend = None

    def of_compilation(self) -> dict[str, str | None]:
        """Those that are decided when a program is compiled."""
        return {"weights": self.weights, "dtype": self.dtype, "activations": self.activations}


@dataclass(frozen=True, slots=True)
class PassOptions:
    """Which passes run, and how they are checked."""

    disable: Disable = None
    enable: Enable = None
    limit: Limit = None
    check: Check = None

    def given(self) -> dict[str, Any]:
        """Those that were given, as arguments of `graphopt.compile`."""
        limits = limits_in(self.limit)
        given = {
            "disable": self.disable,
            "enable": self.enable,
            "limits": limits,
            "check": self.check,
        }
        return {name: value for name, value in given.items() if value}


_GROUPS = (PassOptions, ModelOptions)


def takes_options(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator of a command: a parameter whose type is a group of options above becomes one
    option per field, and the function gets the group."""
    types = get_type_hints(function, include_extras=True)
    groups = {name: kind for name, kind in types.items() if kind in _GROUPS}
    parameters = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=types[name]))
            continue
        hints = get_type_hints(groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name, parameter.kind, default=field.default, annotation=hints[field.name]
            )
            for field in fields(groups[name])
        ]

    @functools.wraps(function)
    def command(**given: Any) -> None:
        made = {
            name: kind(**{field.name: given.pop(field.name) for field in fields(kind)})
            for name, kind in groups.items()
        }
        function(**given, **made)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command
