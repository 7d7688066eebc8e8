"""Typed errors: every failure a user can cause has its own class, and says what would work.

All derive from `GraphoptError`, so `except GraphoptError` catches whatever graphopt itself
refuses and nothing else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraphoptError(Exception):
    """Base of every error raised on purpose by graphopt."""


class UnsupportedError(GraphoptError):
    """An option, format or feature that is not supported; the text names it and what is."""


class ModelNotFoundError(GraphoptError):
    """A model reference that is no folder, GGUF file, built-in or reachable hub name."""


class DownloadError(GraphoptError):
    """Weights could not be fetched, or what arrived is not what was pinned."""


class WeightFormatError(GraphoptError):
    """A weight file that is damaged, pickled, or does not fit the model's configuration."""


class CaptureError(GraphoptError):
    """The model could not be captured as one graph without changing its meaning."""


class VerifyError(GraphoptError):
    """A graph broke an invariant of the IR; the text names the pass, the node and the invariant."""


class PassError(GraphoptError):
    """A pass could not be run: unknown name, unmet requirement, cycle in the declared order."""


class PluginError(PassError):
    """Passes or ops of another distribution could not be loaded; the text names it and the cause.

    A PassError, because compiling needs the passes.
    """


class NoRecordError(PassError):
    """`explain` was asked about passes of which there is no record; the text says what there is."""


class RowDependenceError(PassError):
    """An op outside attention mixes token rows, so no KV cache can be inserted."""


class NumericsError(PassError):
    """A pass changed what the model computes by more than its tier allows."""


class ExpectationError(GraphoptError, AssertionError):
    """`compile(expect=...)` or `testing.expect` named a count that the run did not reach."""


class GoldenError(GraphoptError, AssertionError):
    """A graph is not what its golden file holds, or the file is missing or cannot be read."""


class BackendError(GraphoptError):
    """A backend could not lower or run a graph."""


class ProgramFormatError(GraphoptError):
    """A saved program is incomplete, altered, or written by an incompatible version."""


class RequestError(GraphoptError):
    """A generation request whose parameters or tokens are not acceptable."""


class ScoreRangeError(RequestError):
    """Scores of attention that lie where a hidden key would weigh something beside a seen one: the
    serving graph, which leaves hidden keys out, would compute something else than the model."""


class CapacityError(RequestError):
    """A request that could never fit into the KV cache, or the queue is full."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" when one of `known` is spelled like `name`, else ""."""
    close = difflib.get_close_matches(name, sorted(set(known)), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
