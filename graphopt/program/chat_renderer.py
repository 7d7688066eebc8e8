"""Renders a chat template in a process of its own: run as a script, never imported by graphopt.

Reads one JSON object from standard input, {"path": [...], "template", "variables", "limits"}, and
writes one to standard output, {"text"} or {"error"}. A template is code of the model's author. The
sandbox keeps it from the machine, and the limits of this process, set before the template is looked
at, from its time and its memory: neither a loop nor one call in C that asks for ten gigabytes can
get past them.

The environment is the one that transformers gives to chat templates.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any


def main() -> None:
    """One request, one answer."""
    request = json.loads(sys.stdin.buffer.read())
    limits = request["limits"]
    _limit(resource.RLIMIT_AS, limits["bytes"])
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, limits["cpu_seconds"])
    # Where the machine is busy, or suspended, and in case that nobody waits any more.
    signal.setitimer(signal.ITIMER_REAL, limits["seconds"])
    sys.path[:] = request["path"]
    try:
        text = _render(request["template"], request["variables"])
        answer = {"text": text}
        if len(text) > limits["characters"]:
            answer = {"error": f"it writes more than {limits['characters']} characters"}
    except MemoryError:
        answer = {"error": f"it takes more than {limits['bytes'] >> 20} MiB"}
    # jinja2's own errors and whatever an expression of the template raises.
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"[:500]}
    sys.stdout.write(json.dumps(answer))


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _render(template: str, variables: dict[str, Any]) -> str:
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks what the assistant wrote; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 -- jinja2 declares it so

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("written"), [], [], body).set_lineno(line)

        def written(self, caller: Callable[[], str]) -> str:
            return caller()

    class PublicNamespace(Namespace):
        def __init__(*values: Any, **named: Any) -> None:
            self, attributes = values[0], dict(*values[1:], **named)
            Namespace.__init__(self, {})
            for name, value in attributes.items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"a namespace has no attribute {name!r}")
            Namespace.__setitem__(self, name, value)

    class Dict:
        def __call__(self, *values: Any, **named: Any) -> dict[Any, Any]:
            return dict(*values, **named)

        def fromkeys(self, *values: Any) -> dict[Any, Any]:
            return dict.fromkeys(*values)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": Dict(),
        "namespace": PublicNamespace,
    }
    return environment.from_string(template).render(variables)


if __name__ == "__main__":
    main()
