"""Puts one HTML file together: styles, libraries, scripts and data, nothing from elsewhere.

A content security policy allows exactly these scripts by their hashes and no request at all, so a
name in the data can neither run as code nor load anything.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib.resources import files
from typing import Any

MARKER = "<!-- graphopt explorer page -->"
LIBRARIES = ("d3", "dagre")
SCRIPTS = ("model", "diff", "drawing", "candidates", "costs", "details", "search", "main")
_PLACE = re.compile(r"\{\{(\w+)\}\}")


def render(data: dict[str, Any]) -> str:
    """The page that shows `page_data`."""
    style = _read("page.css")
    vendor = "\n".join(_library(name) for name in LIBRARIES)
    code = '"use strict";\n{\n' + "\n".join(_read(f"js/{name}.js") for name in SCRIPTS) + "}\n"
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(vendor)} {_hash(code)}"
    )
    values = {
        "marker": MARKER,
        "policy": policy,
        "title": html.escape(f"{data['name']} - graphopt explorer"),
        "style": style,
        # "<" is what could end the script element; in JSON it stands in strings only.
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "vendor": vendor,
        "code": code,
    }
    # One substitution: what is put in is not searched for places again.
    return _PLACE.sub(lambda match: values[match[1]], _read("page.html"))


def _read(name: str) -> str:
    return files("graphopt.inspect.explorer").joinpath(name).read_text(encoding="utf-8")


def _library(name: str) -> str:
    """A library below its licence, without the address of a source map that is not there."""
    licence = _read(f"vendor/{name}.LICENSE").strip()
    code = re.sub(r"//# sourceMappingURL=.*", "", _read(f"vendor/{name}.min.js")).strip()
    return f"/*! {name}\n{licence}\n*/\n{code}"


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
