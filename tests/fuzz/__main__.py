"""`python -m tests.fuzz NAME --seed 1 --count 20000`: run a fuzzer, keep what fails, print counts.

`--only K` runs case K again. Several NAMEs, or none for all of them, run one after another.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))

from . import harness  # noqa: E402


def main() -> int:
    """Exit status 1 when a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(harness.names())}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--only", type=int, help="one case, by its number")
    parser.add_argument("--failures", type=Path, default=ROOT / "build" / "fuzz")
    options = parser.parse_args()
    unknown = set(options.names) - set(harness.names())
    if unknown:
        parser.error(f"no fuzzer {', '.join(unknown)}; there are {', '.join(harness.names())}")
    numbers = range(options.start, options.start + options.count)
    if options.only is not None:
        numbers = range(options.only, options.only + 1)
    failed = False
    for name in options.names or harness.names():
        began = time.monotonic()
        outcome = harness.run(name, options.seed, numbers, failures=options.failures)
        print(f"{outcome.describe()}; {time.monotonic() - began:.0f} s")  # noqa: T201
        for result in outcome.failures:
            last = result.text.strip().splitlines()[-1] if result.text else ""
            print(f"  case {result.number}: {result.end.value}: {last}")  # noqa: T201
        failed = failed or bool(outcome.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
