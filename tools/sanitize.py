"""The native kernels under the compiler's sanitizers.

    python tools/sanitize.py address                     # ASan + UBSan, all tests of the kernels
    python tools/sanitize.py address -m pytest tests/codegen/test_cpu_kernels.py
    python tools/sanitize.py thread                      # TSan, recorded plans from 4 threads
    python tools/sanitize.py thread --callers 8 --rounds 1000 --prove

`address` runs Python with the arguments behind it (default: pytest on tests/codegen) on a library
built with `-fsanitize=address,undefined`; the first finding ends the process. `thread` builds the
library and `tests/codegen/stress/stress.cpp` with `-fsanitize=thread` and runs plans of small
models from several threads at once. The libraries are kept in the cache folder like any other.

Exit status: 0 clean, 77 when the compiler has no such sanitizer, anything else is a finding.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from graphopt.codegen.cpu.build import FLAGS, SOURCES, build_library, find_compiler
from graphopt.config import child_environment
from graphopt.errors import BackendError

ROOT = Path(__file__).resolve().parent.parent
STRESS = ROOT / "tests" / "codegen" / "stress"
ADDRESS = (
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
)
THREAD = ("-O1", "-g", "-fsanitize=thread")
KERNEL_TESTS = (
    *("-m", "pytest", "-q", "-p", "no:faulthandler", "-m", "not slow"),
    # What a native library writes to standard error is seen.
    "--capture=sys",
    "tests/codegen",
    # A sanitizer needs the address space that this one takes away.
    "--ignore=tests/codegen/test_cpu_exhaustion.py",
)
SKIPPED = 77
_SECONDS = 3600


class MissingError(Exception):
    """The compiler has no such sanitizer; the text says what it said."""


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("address", usage="%(prog)s [arguments of Python]")
    thread = kinds.add_parser("thread")
    thread.add_argument("--callers", type=int, default=4)
    thread.add_argument("--rounds", type=int, default=150)
    thread.add_argument(
        "--prove", action="store_true", help="then drop all barriers: races must be found"
    )
    options, python = parser.parse_known_args()
    if python and options.kind != "address":
        parser.error(f"unknown arguments: {' '.join(python)}")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if options.kind == "address":
                return under_address(python or KERNEL_TESTS, Path(scratch))
            return under_thread(options, Path(scratch))
        except MissingError as error:
            print(error)
            return SKIPPED


def under_address(arguments: list[str] | tuple[str, ...], scratch: Path) -> int:
    """Python with `arguments` on the sanitized library."""
    compiler = find_compiler()
    # A sanitizer's runtime must be the first library; its interceptors look for libstdc++.
    preload = [runtime(compiler, ADDRESS, name, scratch) for name in ("libasan", "libstdc++")]
    build_library(extra=ADDRESS)
    report = scratch / "report"
    environment = child_environment(
        GRAPHOPT_CXXFLAGS=" ".join(ADDRESS),
        LD_PRELOAD=":".join(preload),
        # Python frees little at its end. Tests capture standard error: ASan writes to files.
        ASAN_OPTIONS=f"detect_leaks=0:handle_abort=1:log_path={report}",
        UBSAN_OPTIONS=f"print_stacktrace=1:log_path={report}",
        OMP_NUM_THREADS="1",
    )
    status = subprocess.call([sys.executable, *arguments], env=environment, cwd=ROOT)
    findings = sorted(scratch.glob("report.*"))
    for finding in findings:
        print(finding.read_text(errors="replace"))
    return status or int(bool(findings))


def under_thread(options: argparse.Namespace, scratch: Path) -> int:
    """The driver on recorded plans."""
    compiler = find_compiler()
    runtime(compiler, THREAD, "libtsan", scratch)
    library = build_library(extra=THREAD)
    driver, plans = scratch / "stress", scratch / "plans"
    subprocess.run([sys.executable, STRESS / "record_plans.py", plans], check=True, cwd=ROOT)
    build = [compiler, *FLAGS, *THREAD, f"-I{SOURCES}", STRESS / "stress.cpp", library]
    subprocess.run([*build, f"-Wl,-rpath,{library.parent}", "-o", driver], check=True)
    command = [driver, plans, str(options.callers), str(options.rounds)]
    environment = child_environment(TSAN_OPTIONS="halt_on_error=1")
    status = subprocess.call(command, env=environment, timeout=_SECONDS)
    if status or not options.prove:
        return status
    if not subprocess.call([*command, "drop-barriers"], env=environment, timeout=_SECONDS):
        print("the races of plans without barriers were not found")
        return 1
    print("without barriers the races are found")
    return 0


def runtime(compiler: str, flags: tuple[str, ...], name: str, scratch: Path) -> str:
    """Path of the shared library `name` in a program that was built with `flags`.

    Raises MissingError when none can be built or run, or its runtime is not a shared library.
    """
    probe = scratch / "probe"
    source = "#include <string>\nint main(int n, char**) { return std::string(n, 'x').size() - 1; }"
    built = subprocess.run(
        [compiler, *flags, "-x", "c++", "-", "-o", probe],
        input=source,
        capture_output=True,
        text=True,
    )
    if built.returncode or subprocess.run([probe], capture_output=True).returncode:
        raise MissingError(f"{compiler} {' '.join(flags)} does not work here:\n{built.stderr}")
    listed = subprocess.run(["ldd", probe], capture_output=True, text=True).stdout
    for line in listed.splitlines():
        if line.strip().startswith(name) and "=> /" in line:
            return line.split("=> ")[1].split()[0]
    raise MissingError(f"{compiler} links {name} statically: g++ is needed (CXX=g++)")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BackendError as error:
        print(error)
        sys.exit(SKIPPED if "no C++ compiler" in str(error) else 1)
