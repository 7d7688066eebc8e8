"""Text as tokens arrive: whole characters only, and nothing that may still become a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"
# Enough of the prompt to know whether the first token's leading space is text.
_PROMPT_CONTEXT = 5
# No UTF-8 character is longer, and no token shorter than a byte.
_LONGEST_CHARACTER = 4


class Detokenizer:
    """Incremental detokenisation of one request.

    Tokens are decoded in a short window whose beginning is known text, because a token's text
    depends on its neighbours (byte-level tokenizers split characters; others drop a leading space).
    Text that could be the beginning of a stop text is held back.

    tokenizer: has Hugging Face's `decode(ids, skip_special_tokens=..., ...)`. prompt: the tokens
    before; they are not part of the text. stop: texts that end it. `text` is all that is certain
    so far; `stopped` tells that it ended before a stop text. The pieces that `push` and `finish`
    return make up `text`.
    """

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int] = (), stop: tuple[str, ...] = ()
    ) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens = list(prompt[-_PROMPT_CONTEXT:])
        self._context, self._read = 0, len(self._tokens)
        # A character that the prompt began belongs to the text.
        self._known = self._decode(0, self._read).rstrip(_REPLACEMENT)
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain."""
        self._tokens.append(token)
        end = len(self._tokens)
        whole = self._decode(self._context, end)
        if whole == self._known:
            # A skipped special token: forgotten, or the window would grow with every one.
            self._tokens.pop()
            return ""
        if whole.endswith(_REPLACEMENT):
            if not whole.endswith(_REPLACEMENT * 2 * _LONGEST_CHARACTER):
                return ""
            # Bytes that are no text: here too the window would grow.
            end -= _LONGEST_CHARACTER
            if end <= self._read:
                return ""
            whole = self._decode(self._context, end)
        return self._advance(whole, end)

    def finish(self) -> str:
        """No more tokens: returns whatever is left, half characters included."""
        end = len(self._tokens)
        text = self._advance(self._decode(self._context, end), end)
        self.text += self._held
        text, self._held = text + self._held, ""
        return text

    def _decode(self, start: int, stop: int) -> str:
        # Tidying up spaces would change text that has already been sent.
        text: str = self._tokenizer.decode(
            self._tokens[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _advance(self, whole: str, end: int) -> str:
        fresh = whole[len(self._known) :]
        if not fresh:
            return ""
        self._context, self._read = self._read, end
        self._known = self._decode(self._context, end)
        return self._emit(fresh)

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
