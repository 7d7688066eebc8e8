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
MODULES = ("graphopt_pytest",)


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
        for module in MODULES:
            (Path(scratch) / f"{module}.py").symlink_to(ROOT / f"{module}.py")
        command = [sys.executable, "-m", "mypy", "--strict", "--config-file"]
        command += [str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
        named = [word for module in MODULES for word in ("-m", module)]
        return subprocess.call([*command, "-p", "graphopt", *named], cwd=scratch)


if __name__ == "__main__":
    sys.exit(main())
