"""Names in the graph text, whatever characters a model uses in them.

A character that would end a name is written as a backslash, u, and six hexadecimal digits.
"""

from __future__ import annotations

import re

_ODD_IN_WEIGHTS = re.compile(r"[^\w.]")
# What ends a line or a part of a comment, blanks at the ends, which readers strip, and halves of
# characters, which no file can hold.
_ODD_IN_COMMENTS = re.compile(r"[|#\\\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]|^\s|\s$")
_ESCAPED = re.compile(r"\\u([0-9a-f]{6})")


def weight_text(name: str) -> str:
    """A weight's name as it stands after `@`."""
    return _ODD_IN_WEIGHTS.sub(_escape, name)


def comment_text(name: str) -> str:
    """A layer or a source line as it stands in a comment."""
    return _ODD_IN_COMMENTS.sub(_escape, name)


def _escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):06x}"


def plain_name(text: str) -> str:
    """Back from `weight_text` or `comment_text`."""
    return _ESCAPED.sub(lambda match: chr(min(int(match[1], 16), 0x10FFFF)), text)
