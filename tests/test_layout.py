"""The installed package: what is in the wheel, who may import whom, house rules."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = {
    "graphopt": ROOT / "graphopt",
    "graphopt.passes": ROOT / "passes",
    "graphopt.codegen": ROOT / "codegen",
    "graphopt.runtime": ROOT / "runtime",
    "graphopt.models": ROOT / "models",
}
# Who may import whom: a package sees itself and what is listed.
BASE = {"graphopt.errors", "graphopt.config", "graphopt.report"}
ARROWS = {
    "graphopt.ir": {"graphopt.ir", "graphopt.ops", *BASE},
    "graphopt.ops": {"graphopt.ops", "graphopt.ir.weights", *BASE},
    "graphopt.capture": {"graphopt.capture", "graphopt.ir", "graphopt.ops", *BASE},
    "graphopt.passes": {"graphopt.passes", "graphopt.ir", "graphopt.ops", *BASE},
    "graphopt.codegen": {
        "graphopt.codegen",
        "graphopt.passes",
        "graphopt.ir",
        "graphopt.ops",
        *BASE,
    },
    "graphopt.runtime": {"graphopt.runtime", "graphopt.codegen", *BASE},
    "graphopt.models": {"graphopt.models", "graphopt.capture", "graphopt.ir.weights", *BASE},
}


def sources() -> list[tuple[str, Path]]:
    """(module name, file) of every Python file of the package."""
    found = []
    for package, folder in PARTS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found.append((".".join([package, *parts]).removesuffix(".__init__"), path))
    return found


def imports(path: Path) -> set[str]:
    """graphopt modules that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("graphopt.")}


@pytest.mark.parametrize("package", sorted(ARROWS))
def test_imports_point_one_way(package: str) -> None:
    files = [(n, p) for n, p in sources() if n == package or n.startswith(package + ".")]
    assert files
    for name, path in files:
        for imported in imports(path):
            allowed = any(
                imported == target or imported.startswith(target + ".")
                for target in ARROWS[package]
            )
            parent = any(target.startswith(imported + ".") for target in ARROWS[package])
            assert allowed or parent, f"{name} imports {imported}"


def test_the_wheel_holds_the_tree_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps"]
    command += ["--no-build-isolation", "-q", "-w", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    expected = {"graphopt/py.typed"}
    for package, folder in PARTS.items():
        for path in folder.rglob("*"):
            if path.suffix in {".py", ".cpp", ".h"}:
                inside = path.relative_to(folder).as_posix()
                expected.add(f"{package.replace('.', '/')}/{inside}")
    assert names == expected


def test_a_users_own_packages_keep_working(tmp_path: Path) -> None:
    for name in ("passes", "models", "runtime", "codegen"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"MINE = {name!r}\n")
    code = (
        "import passes, models, runtime, codegen\n"
        "import graphopt.passes.base, graphopt.models, graphopt.runtime, graphopt.codegen.backend\n"
        "assert passes.MINE == 'passes' and models.MINE == 'models'\n"
        "assert not hasattr(graphopt.passes, 'MINE') and not hasattr(graphopt.models, 'MINE')\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_house_rules() -> None:
    for name, path in sources():
        text = path.read_text()
        limit = 400 if name.startswith("graphopt.passes") else 600
        assert len(text.splitlines()) <= limit, name
        assert text.lstrip().startswith('"""'), f"{name} has no docstring"
        if name != "graphopt.config":
            assert "os.environ" not in text, name
        if name not in ("graphopt.ir.builder",):
            assert ".call_function(" not in text, name
