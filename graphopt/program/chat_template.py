"""A user's message in a model's chat template, with limits on what the template may do.

    template + message --chat_renderer.py, a child process with limits--> text --tokenizer--> ids

A template comes with the model and is a program: it can loop for ever or ask for any amount of
memory in one expression. No check of its text finds that, so it runs where the operating system can
stop it. Starting the child takes about a tenth of a second.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from graphopt.errors import RequestError

_RENDERER = Path(__file__).with_name("chat_renderer.py")
_MOST_CHARACTERS = 1 << 20
"""Of what the template adds to the message."""
_LIMITS = {"bytes": 1 << 29, "cpu_seconds": 1, "seconds": 20}


def chat_ids(tokenizer: Any, message: str) -> list[int]:
    """Token ids of one user message and the beginning of an answer, in the tokenizer's template;
    of the message alone where it has none.

    Raises RequestError for a template that is none, that fails, refuses the message, or takes more
    than its limits.
    """
    if not isinstance(message, str):
        raise RequestError(f"a chat message is a text, not {type(message).__name__}")
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return list(tokenizer.encode(message))
    text = _rendered(_default(template), message, tokenizer.special_tokens_map)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _default(template: Any) -> str:
    """The template for plain chats where a tokenizer has several by name."""
    chosen = template.get("default") if isinstance(template, dict) else template
    if isinstance(chosen, str):
        return chosen
    known = f"{sorted(map(str, template))} without 'default'" if isinstance(template, dict) else ""
    raise RequestError(
        f"the model's chat template is {known or f'a {type(chosen).__name__}'}; set "
        "program.tokenizer.chat_template to a text, or write the prompt yourself"
    )


def _rendered(template: str, message: str, special_tokens: dict[str, Any]) -> str:
    request = {
        # The child imports what this process does, and nothing from its working folder.
        "path": [entry for entry in sys.path if entry],
        "template": template,
        "variables": {
            **{"messages": [{"role": "user", "content": message}], "tools": None},
            **{"documents": None, "add_generation_prompt": True},
            **{name: str(token) for name, token in special_tokens.items()},
        },
        "limits": {**_LIMITS, "characters": _MOST_CHARACTERS + len(message)},
    }
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-X", "utf8", str(_RENDERER)],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=2 * _LIMITS["seconds"],
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RequestError(f"no process could render the model's chat template: {error}") from error
    if done.returncode < 0:
        raise _failed(f"it takes more than {_LIMITS['cpu_seconds']} s, or its process was killed")
    if done.returncode > 0:
        raise _failed(done.stderr.decode(errors="replace").strip()[-500:])
    answer: dict[str, str] = json.loads(done.stdout)
    if "error" in answer:
        raise _failed(answer["error"])
    return answer["text"]


def _failed(why: str) -> RequestError:
    return RequestError(
        f"the model's chat template could not be used: {why}. Set program.tokenizer.chat_template "
        "to another one, or write the prompt yourself"
    )
