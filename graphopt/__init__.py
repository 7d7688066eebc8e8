"""graphopt: a graph compiler for transformer models whose every rewrite can be seen and checked.

    import graphopt
    program = graphopt.compile("smollm2-135m")
    print(program.generate("The capital of France is", max_tokens=16)[0].text)

Names are imported on first use: `import graphopt` alone waits for nothing, torch included.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.capture.source import ModelSource
    from graphopt.check.bisect import Bisection, bisect
    from graphopt.inspect.explain import explain
    from graphopt.inspect.explorer import explore
    from graphopt.inspect.rows import Explanation
    from graphopt.ir.graph import Graph
    from graphopt.passes.registry import register_pass
    from graphopt.program.compile import compile
    from graphopt.program.program import Program
    from graphopt.program.save import load_program
    from graphopt.record.dump import Dump
    from graphopt.runtime import SamplingParams

__version__ = "0.1.0"

_HOME = {
    "Bisection": "graphopt.check.bisect",
    "Dump": "graphopt.record.dump",
    "Explanation": "graphopt.inspect.rows",
    "Graph": "graphopt.ir.graph",
    "ModelSource": "graphopt.capture.source",
    "Program": "graphopt.program.program",
    "SamplingParams": "graphopt.runtime",
    "bisect": "graphopt.check.bisect",
    "compile": "graphopt.program.compile",
    "explain": "graphopt.inspect.explain",
    "explore": "graphopt.inspect.explorer",
    "load_program": "graphopt.program.save",
    "register_pass": "graphopt.passes.registry",
}

__all__ = [
    "Bisection",
    "Dump",
    "Explanation",
    "Graph",
    "ModelSource",
    "Program",
    "SamplingParams",
    "__version__",
    "bisect",
    "capture",
    "compile",
    "explain",
    "explore",
    "load_program",
    "register_pass",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'graphopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "capture"})


if TYPE_CHECKING:
    from graphopt.capture.capture import capture
else:

    class _Package(ModuleType):
        """`capture` is a function here and also the name of a subpackage, which the import system
        puts in its place as soon as anything of it is imported: it is not let."""

        @property
        def capture(self) -> Any:
            """`graphopt.capture(model)`."""
            return import_module("graphopt.capture.capture").capture

        @capture.setter
        def capture(self, _module: ModuleType) -> None:
            pass

    sys.modules[__name__].__class__ = _Package
