"""Builds the native kernels with the machine's C++ compiler, once, into the cache folder.

The library's name holds a hash of everything it depends on (sources, flags, compiler version, CPU
features), so a stale one is never loaded and folders shared between machines are safe. Building is
race-free: each builder works in its own temporary folder and renames the result into place.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


@functools.cache
def load_library(cache: Path | None = None) -> NativeLibrary:
    """The native library, built if needed. `cache`: folder (default: the Config's).

    One library a process and folder. Raises BackendError as `build_library` does.
    """
    return NativeLibrary(build_library(cache))


def build_library(cache: Path | None = None, compiler: str | None = None) -> Path:
    """Path of the shared library for this machine; compiles it when the cache has none.

    cache: folder (default: the Config's). compiler: command or path (default: the environment's
    CXX, else the first of g++, clang++, c++ that is installed). Raises BackendError when there is
    no compiler, or with the last lines of what it said when it fails.
    """
    program = find_compiler(compiler)
    folder = (Config.from_environment().cache if cache is None else cache) / "native"
    target = folder / f"graphopt-{_fingerprint(program)}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = _compile(program, Path(scratch))
            os.replace(built, target)
    return target


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


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in {".h", ".cpp"}:
            digest.update(f"{source.name}\n".encode() + source.read_bytes())
    for fact in (*FLAGS, _output([compiler, "--version"]), platform.machine(), _cpu_features()):
        digest.update(f"\n{fact}".encode())
    return digest.hexdigest()[:20]


def _cpu_features() -> str:
    """What -march=native depends on: two machines with the same answer can share a library."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    keys = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    first_cpu = cpuinfo.read_text().split("\n\n", 1)[0].splitlines()
    return "\n".join(line for line in first_cpu if line.split(":")[0].strip() in keys)


def _compile(compiler: str, scratch: Path) -> Path:
    sources = sorted(SOURCES.glob("*.cpp"))
    objects = [scratch / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        jobs = [
            pool.submit(_output, [compiler, *FLAGS, "-c", str(source), "-o", str(to)])
            for source, to in zip(sources, objects, strict=True)
        ]
        for job in jobs:
            job.result()
    library = scratch / "library.so"
    _output([compiler, *FLAGS, "-shared", *map(str, objects), "-o", str(library)])
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
