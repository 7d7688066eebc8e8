"""The `graphopt` command.

The command line and each command import what takes seconds. Whoever interrupts that gets what an
interrupt gives at any other time, exit status 130, and no traceback of an import.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_INTERRUPTED = 130


def main() -> None:
    """Entry point. Before the command line takes over nothing is begun that needs an end."""
    with interrupts_end():
        from graphopt.cli.app import main as run
    run()


@contextmanager
def interrupts_end() -> Iterator[None]:
    """Within, an interrupt ends the process at once: an exception would be caught, or told, by
    whatever is being imported."""
    # nohup and shells without job control ignore interrupts; so does what they start.
    is_main = threading.current_thread() is threading.main_thread()
    is_ours = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    del number, frame
    os._exit(_INTERRUPTED)
