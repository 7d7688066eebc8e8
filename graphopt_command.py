"""The `graphopt` command.

It stands outside the package, whose import brings torch and takes seconds: whoever interrupts it
then gets what an interrupt gives at any other time, exit status 130 and no traceback.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

_INTERRUPTED = 130


def main() -> None:
    """Entry point. Before the command line takes over nothing is begun that needs an end."""
    # nohup and shells without job control ignore interrupts; so does what they start.
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, _end)
    from graphopt.cli import main as run

    if is_ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _end(number: int, frame: FrameType | None) -> None:
    # An exception would be caught, or told, by whatever is being imported.
    del number, frame
    os._exit(_INTERRUPTED)
