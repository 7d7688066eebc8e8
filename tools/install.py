"""Installs graphopt into the running interpreter's environment, the CPU build of torch first.

Without a torch already installed, `pip install graphopt` on Linux takes torch's CUDA build and
several gigabytes with it. Where a CPU build of a release graphopt was tested with can be found,
it is taken instead; where it cannot, the ordinary resolution decides.
"""

import importlib.util
import subprocess
import sys

TESTED_TORCH = "2.13.0"


def pip(*arguments: str) -> int:
    """Run pip; returns its exit status."""
    return subprocess.call([sys.executable, "-m", "pip", "install", *arguments])


def main() -> int:
    """Install every target given on the command line."""
    if importlib.util.find_spec("torch") is None and pip(f"torch=={TESTED_TORCH}") != 0:
        sys.stderr.write("no torch of the tested release; leaving the choice to pip\n")
    return pip(*sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
