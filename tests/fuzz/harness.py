"""Runs the cases of a fuzzer in worker processes and says how each of them ended.

A case is a number: with the fuzzer's name and the seed it makes one stream of random numbers, and
nothing else decides what the case does. So a failure is reproduced by its number alone. A worker
runs many cases; it is replaced when it crashes, and killed when a case takes longer than the limit.
"""

from __future__ import annotations

import enum
import importlib
import json
import multiprocessing
import pkgutil
import random
import resource
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol, cast

from graphopt.errors import GraphoptError

HANG_SECONDS = 5.0
_START_SECONDS = 180.0
_MEMORY_BYTES = 8 << 30
_INPUTS = "input"


class WrongError(Exception):
    """Raised by a case that ended without an error and with another answer than the right one."""


class End(enum.Enum):
    """How one case ended. The first two are good; every other one is a defect."""

    OK = "ok"
    REFUSED = "refused with a typed error"
    WRONG = "silently wrong"
    UNTYPED = "untyped exception"
    HANG = "hang"
    CRASH = "crash"

    @property
    def good(self) -> bool:
        return self in (End.OK, End.REFUSED)


class Fuzzer(Protocol):
    """What a fuzzer module brings as `FUZZER`: a class, called once per worker.

    ci_count: cases that the test suite runs, at most 20 seconds' worth.
    """

    ci_count: int

    def __init__(self, folder: Path) -> None:
        """Prepare what all cases start from; `folder` is the worker's own and stays."""

    def run(self, numbers: random.Random, folder: Path) -> int:
        """Run one case; its number of operations (1 for a file). `folder` is new and empty.

        What the case reads is written below `folder`: it is kept when the case fails. Raises
        GraphoptError where the product refuses (a good end), WrongError where it should have.
        """


@dataclass(frozen=True, slots=True)
class Result:
    """End of case `number`; `text` is the last line of the error or the whole trace."""

    number: int
    end: End
    operations: int = 1
    text: str = ""


@dataclass(slots=True)
class Outcome:
    """All ends of a run. operations: counted in the cases that ended well."""

    name: str
    seed: int
    ends: Counter[End] = field(default_factory=Counter)
    operations: int = 0
    failures: list[Result] = field(default_factory=list)

    def add(self, result: Result) -> None:
        self.ends[result.end] += 1
        if result.end.good:
            self.operations += result.operations
        else:
            self.failures.append(result)

    def describe(self) -> str:
        """One line: counts of every kind of end."""
        counts = ", ".join(f"{self.ends[end]} {end.value}" for end in End)
        cases = sum(self.ends.values())
        return f"{self.name} (seed {self.seed}): {cases} cases, {self.operations} done: {counts}"


def names() -> list[str]:
    """Names of all fuzzers: the modules of this package that bring one."""
    modules = (info.name for info in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name for name in modules if hasattr(_module(name), "FUZZER"))


def fuzzer(name: str) -> Callable[[Path], Fuzzer]:
    """The fuzzer of that name, to be called with the worker's folder."""
    return cast(Callable[[Path], Fuzzer], _module(name).FUZZER)


def _module(name: str) -> object:
    if name in ("__main__", "harness") or name.startswith("test_"):
        return object()
    return importlib.import_module(f"{__package__}.{name}")


def run(
    name: str,
    seed: int,
    numbers: Iterable[int],
    *,
    failures: Path | None = None,
    limit: float = HANG_SECONDS,
) -> Outcome:
    """Run the cases `numbers` of fuzzer `name` one after another; failing inputs go to `failures`.

    Each failure is a folder `<name>-<seed>-<number>` with `case.json` and the case's input.
    """
    outcome = Outcome(name, seed)
    with tempfile.TemporaryDirectory(prefix="graphopt-fuzz-") as scratch:
        for result in _results(name, seed, numbers, Path(scratch), limit):
            outcome.add(result)
            if failures is not None and not result.end.good:
                _keep(result, outcome, Path(scratch) / _INPUTS, failures)
    return outcome


def _results(
    name: str, seed: int, numbers: Iterable[int], scratch: Path, limit: float
) -> Iterator[Result]:
    worker: _Worker | None = None
    try:
        for number in numbers:
            inputs = scratch / _INPUTS
            shutil.rmtree(inputs, ignore_errors=True)
            inputs.mkdir()
            worker = worker or _Worker(name, seed, scratch)
            result = worker.run(number, limit)
            yield result
            if result.end in (End.HANG, End.CRASH):
                worker.stop()
                worker = None
    finally:
        if worker is not None:
            worker.stop()


def _keep(result: Result, outcome: Outcome, inputs: Path, failures: Path) -> None:
    target = failures / f"{outcome.name}-{outcome.seed}-{result.number}"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(inputs, target, symlinks=True, ignore=_special_files)
    record = {"fuzzer": outcome.name, "seed": outcome.seed, "number": result.number}
    record |= {"end": result.end.value, "error": result.text}
    (target / "case.json").write_text(json.dumps(record, indent=2) + "\n")


def _special_files(folder: str, entries: list[str]) -> list[str]:
    """Pipes and devices are not copied: reading one would not end."""
    paths = (Path(folder) / entry for entry in entries)
    return [p.name for p in paths if not (p.is_symlink() or p.is_file() or p.is_dir())]


class _Worker:
    """A process that has the fuzzer prepared and runs the cases it is told."""

    def __init__(self, name: str, seed: int, scratch: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, child = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(child, name, seed, str(scratch), list(sys.path)), daemon=True
        )
        self._process.start()
        child.close()
        ready = self._receive(_START_SECONDS)
        if ready != "ready":
            raise RuntimeError(f"the worker of fuzzer {name} did not start: {ready}")

    def run(self, number: int, limit: float) -> Result:
        self._connection.send(number)
        answer = self._receive(limit)
        if isinstance(answer, Result):
            return answer
        if answer is None:
            return Result(number, End.HANG, text=f"not done after {limit} s")
        self._process.join(limit)
        return Result(number, End.CRASH, text=f"exit status {self._process.exitcode}")

    def _receive(self, seconds: float) -> object:
        """What the worker sent; None when time is over, EOFError as text when it is dead."""
        if not self._connection.poll(seconds):
            return None
        try:
            return cast(object, self._connection.recv())
        except (EOFError, ConnectionResetError):
            return "dead"

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(connection: Connection, name: str, seed: int, scratch: str, path: list[str]) -> None:
    """Body of a worker: one answer per number received."""
    sys.path[:] = path
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, hard))
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        prepared = fuzzer(name)(Path(folder))
        connection.send("ready")
        while True:
            number = cast(int, connection.recv())
            connection.send(_one(prepared, name, seed, number, Path(scratch) / _INPUTS))


def _one(prepared: Fuzzer, name: str, seed: int, number: int, inputs: Path) -> Result:
    numbers = random.Random(f"{name}:{seed}:{number}")
    try:
        return Result(number, End.OK, prepared.run(numbers, inputs))
    except GraphoptError as error:
        return Result(number, End.REFUSED, text=f"{type(error).__name__}: {error}")
    except WrongError:
        return Result(number, End.WRONG, text=traceback.format_exc())
    except (Exception, SystemExit, KeyboardInterrupt):
        return Result(number, End.UNTYPED, text=traceback.format_exc())
