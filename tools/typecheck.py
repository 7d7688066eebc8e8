"""mypy --strict on the *installed* layout: graphopt.passes, not a top-level `passes`.

The package's folders lie side by side at the top of the repository; this links them into one
package below a temporary folder and checks that.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("passes", "codegen", "runtime", "models")


def main() -> int:
    """Returns mypy's exit status."""
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "graphopt"
        package.mkdir()
        for entry in (ROOT / "graphopt").iterdir():
            if entry.name != "__pycache__":
                (package / entry.name).symlink_to(entry)
        for part in PARTS:
            (package / part).symlink_to(ROOT / part)
        (Path(scratch) / "graphopt_pytest.py").symlink_to(ROOT / "graphopt_pytest.py")
        command = [sys.executable, "-m", "mypy", "--strict", "--config-file"]
        command += [str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
        return subprocess.call([*command, "-p", "graphopt", "-m", "graphopt_pytest"], cwd=scratch)


if __name__ == "__main__":
    sys.exit(main())
