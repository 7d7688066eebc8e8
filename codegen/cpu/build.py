"""Builds the native kernels with the machine's C++ compiler, once, into the cache folder.

The library's name holds a hash of everything it depends on (sources, flags, those of the Config
among them, and CPU features, then the compiler's version), so a stale one is never loaded and
folders shared between machines are safe. A machine without a compiler takes a library that another
one built for its CPU.

A library is used only when its last bytes are the SHA-256 of all before them (the loader ignores
what follows an ELF image): what a power cut or a full disk left of one is built anew. Builders take
turns under a lock, write to a folder of their own, flush, and rename into place; what a killed
builder left is removed by the next.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from graphopt.codegen.cpu.abi import NativeLibrary
from graphopt.config import Config, child_environment
from graphopt.errors import BackendError

SOURCES = Path(__file__).parent / "native"
# Contraction is off because a row's result must not depend on how the compiler fused its loop.
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",
    "-Wno-psabi",
)
_COMPILERS = ("g++", "clang++", "c++")
_LAST_LINES = 30
_SEAL = b"graphopt sha256:"
_SEAL_SIZE = len(_SEAL) + hashlib.sha256().digest_size
_SCRATCH = "building-"


@functools.cache
def load_library(cache: Path | None = None) -> NativeLibrary:
    """The native library, built if needed. `cache`: folder (default: the Config's).

    One library a process and folder. Raises BackendError as `build_library` does.
    """
    return NativeLibrary(build_library(cache))


def build_library(
    cache: Path | None = None,
    compiler: str | None = None,
    extra: Sequence[str] | None = None,
) -> Path:
    """Path of the shared library for this machine; compiles it when the cache has no sound one.

    cache: folder; extra: flags after `FLAGS` (default of both: the Config's). compiler: command or
    path (default: the environment's CXX, else the first of g++, clang++, c++ that is installed).
    Raises BackendError when the folder cannot be used, when there is neither a compiler nor a
    library of another machine, or with the last lines of what the compiler said when it fails.
    """
    config = Config.from_environment()
    folder = (config.cache if cache is None else cache) / "native"
    flags = (*FLAGS, *(config.cxxflags if extra is None else extra))
    machine = _hash_of_machine(flags)
    try:
        program = find_compiler(compiler)
    except BackendError:
        for built in sorted(folder.glob(f"graphopt-{machine}-*.so")):
            if is_sound(built):
                return built
        raise
    target = folder / f"graphopt-{machine}-{_hash(_output([program, '--version']))[:8]}.so"
    if is_sound(target):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            for left in folder.glob(f"{_SCRATCH}*"):
                shutil.rmtree(left, ignore_errors=True)
            if not is_sound(target):
                with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as scratch:
                    built = _compile(program, flags, Path(scratch))
                    seal(built)
                    os.replace(built, target)
    except OSError as error:
        raise BackendError(
            f"the native kernels cannot be kept in {folder}: {error}; name a folder that can be "
            "written in the environment variable GRAPHOPT_CACHE"
        ) from error
    return target


def is_sound(library: Path) -> bool:
    """True for a library that is whole: it ends with the digest of what comes before."""
    try:
        data = library.read_bytes()
    except OSError:
        return False
    body, end = data[:-_SEAL_SIZE], data[-_SEAL_SIZE:]
    return end == _SEAL + hashlib.sha256(body).digest()


def seal(library: Path) -> None:
    """Append the digest, and flush all of it to the disk."""
    with library.open("r+b") as file:
        digest = hashlib.sha256(file.read()).digest()
        file.write(_SEAL + digest)
        file.flush()
        os.fsync(file.fileno())


def find_compiler(compiler: str | None = None) -> str:
    """Path of the C++ compiler. Raises BackendError when none is found."""
    wanted = compiler or child_environment().get("CXX")
    tried = (wanted,) if wanted else _COMPILERS
    for name in tried:
        path = shutil.which(name)
        if path is not None:
            return path
    raise BackendError(
        f"no C++ compiler found (tried {', '.join(tried)}): install g++ or clang++, or name one "
        "in the environment variable CXX"
    )


def _hash_of_machine(flags: Sequence[str]) -> str:
    """Of all that a library depends on but the compiler."""
    parts = [
        f"{source.name}\n{source.read_text()}"
        for source in sorted(SOURCES.iterdir())
        if source.suffix in {".h", ".cpp"}
    ]
    return _hash(*parts, *flags, platform.machine(), _cpu_features())[:20]


def _hash(*facts: str) -> str:
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _cpu_features() -> str:
    """What -march=native depends on: two machines with the same answer can share a library."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    keys = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    first_cpu = cpuinfo.read_text().split("\n\n", 1)[0].splitlines()
    return "\n".join(line for line in first_cpu if line.split(":")[0].strip() in keys)


def _compile(compiler: str, flags: Sequence[str], scratch: Path) -> Path:
    sources = sorted(SOURCES.glob("*.cpp"))
    objects = [scratch / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        jobs = [
            pool.submit(_output, [compiler, *flags, "-c", str(source), "-o", str(to)])
            for source, to in zip(sources, objects, strict=True)
        ]
        for job in jobs:
            job.result()
    library = scratch / "library.so"
    _output([compiler, *flags, "-shared", *map(str, objects), "-o", str(library)])
    return library


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BackendError(f"cannot run the C++ compiler {command[0]}: {error}") from error
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-_LAST_LINES:])
        raise BackendError(f"{command[0]} failed ({done.returncode}) on the CPU kernels:\n{said}")
    return done.stdout
