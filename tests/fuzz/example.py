"""A fuzzer whose first six cases end in the six ways there are: what the harness is tested with."""

import os
import random
import time
from pathlib import Path

from graphopt.errors import RequestError

from .harness import WrongError


class Example:
    """Counts its own cases: the harness must start a new worker after a crash and a hang."""

    ci_count = 6

    def __init__(self, folder: Path) -> None:
        self._state = folder.parent / "cases"

    def run(self, numbers: random.Random, folder: Path) -> int:
        (folder / "input.txt").write_text("kept")
        with self._state.open("a+") as file:
            file.write("x")
            file.seek(0)
            case = len(file.read())
        match case:
            case 1:
                return 7
            case 2:
                raise RequestError("refused")
            case 3:
                raise WrongError("another answer")
            case 4:
                raise SystemExit(0)
            case 5:
                time.sleep(60)
            case _:
                os.abort()
        return 1


FUZZER = Example
