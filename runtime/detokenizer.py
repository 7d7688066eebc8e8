"""Text as tokens arrive: whole characters only, and nothing that may still become a stop text."""

from __future__ import annotations

from typing import Any

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Incremental detokenisation of one request.

    Tokens are decoded in a short window whose beginning is known text, because a token's text
    depends on its neighbours (byte-level tokenizers split characters; others drop a leading space).
    Text that could be the beginning of a stop string is held back.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens: list[int] = []
        self._context = 0
        self._read = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain."""
        self._tokens.append(token)
        known = self._decode(self._context, self._read)
        whole = self._decode(self._context, len(self._tokens))
        if len(whole) <= len(known) or whole.endswith(_REPLACEMENT):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return self._emit(whole[len(known) :])

    def finish(self) -> str:
        """No more tokens: whatever is left, half characters included."""
        known = self._decode(self._context, self._read)
        rest = self._decode(self._context, len(self._tokens))[len(known) :]
        self._read = len(self._tokens)
        text = self._emit(rest)
        if not self.stopped:
            text += self._held
            self.text += self._held
            self._held = ""
        return text

    def _decode(self, start: int, stop: int) -> str:
        text: str = self._tokenizer.decode(self._tokens[start:stop], skip_special_tokens=True)
        return text

    def _emit(self, fresh: str) -> str:
        if self.stopped:
            return ""
        pending = self._held + fresh
        ends = [pending.find(text) for text in self._stop if text in pending]
        if ends:
            self.stopped = True
            certain, self._held = pending[: min(ends)], ""
        else:
            keep = max((_overlap(pending, text) for text in self._stop), default=0)
            certain = pending[: len(pending) - keep]
            self._held = pending[len(pending) - keep :]
        self.text += certain
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0
    )
