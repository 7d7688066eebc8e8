"""The installed package: what is in the wheel, who may import whom, house rules."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphopt.config import child_environment

ROOT = Path(__file__).parent.parent
PARTS = {
    "graphopt": ROOT / "graphopt",
    "graphopt.passes": ROOT / "passes",
    "graphopt.codegen": ROOT / "codegen",
    "graphopt.runtime": ROOT / "runtime",
    "graphopt.models": ROOT / "models",
}
MODULES = {"graphopt_pytest": ROOT / "graphopt_pytest.py"}
# Who may import whom, in the order of data: a room sees itself, what is listed, and the ground.
GROUND = {
    "graphopt.errors",
    "graphopt.config",
    "graphopt.plugins",
    "graphopt.files",
    "graphopt.__version__",
}
IR = {"graphopt.ir", *GROUND}
OPS = {"graphopt.ops", *IR}
RECORD = {"graphopt.record", *IR}
PASSES = {"graphopt.passes", "graphopt.ops", *RECORD}
RUNTIME = {"graphopt.runtime", "graphopt.codegen.backend", "graphopt.errors"}
CHECK = {"graphopt.check", "graphopt.capture", "graphopt.models", "graphopt.codegen", *PASSES}
PROGRAM = {"graphopt.program", "graphopt.runtime", *CHECK}
INSPECT = {"graphopt.inspect", "graphopt.cost", "graphopt.testing", *PROGRAM}
ARROWS = {
    "graphopt.errors": set[str](),
    "graphopt.config": {"graphopt.errors"},
    "graphopt.plugins": {"graphopt.errors"},
    "graphopt.files": {"graphopt.files", "graphopt.errors"},
    "graphopt.ir": IR,
    "graphopt.ops": OPS,
    "graphopt.capture": {"graphopt.capture", *OPS},
    "graphopt.record": RECORD,
    "graphopt.cost": {"graphopt.cost", *OPS},
    "graphopt.models": {
        "graphopt.models",
        "graphopt.capture.source",
        "graphopt.ir.weights",
        "graphopt.errors",
        "graphopt.config",
        "graphopt.files",
    },
    "graphopt.passes": PASSES,
    "graphopt.codegen": {"graphopt.codegen", "graphopt.ops", *RECORD},
    "graphopt.runtime": RUNTIME,
    "graphopt.check": CHECK,
    "graphopt.program": PROGRAM,
    "graphopt.testing": {"graphopt.testing", *PROGRAM},
    "graphopt.inspect": INSPECT,
    "graphopt.cli": {"graphopt.cli", *INSPECT},
}
# What a room must not know of another that it may import.
NEVER = {
    "graphopt.check": {"graphopt.codegen.cpu"},
    "graphopt.program": {"graphopt.codegen.cpu", "graphopt.codegen.reference"},
    "graphopt.inspect": {"graphopt.codegen.cpu", "graphopt.codegen.reference"},
    "graphopt.cli": {"graphopt.codegen.cpu", "graphopt.codegen.reference"},
}
# The ground floor: what is not of the standard library.
LEAN = {"graphopt.ir": {"torch", "sympy"}, "graphopt.ops": {"torch", "sympy"}}
FLAT = {"__init__", "errors", "config", "plugins"}


def sources() -> list[tuple[str, Path]]:
    """(module name, file) of every Python file of the package."""
    found = []
    for package, folder in PARTS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found.append((".".join([package, *parts]).removesuffix(".__init__"), path))
    return found


def imported(code: str) -> set[str]:
    """Modules that are imported, and what is imported from them, with all their parents."""
    names: set[str] = set()
    for name in imported_names(code):
        parts = name.split(".")
        names |= {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    return names


def imported_names(code: str) -> set[str]:
    """`import a.b` gives "a.b", `from a import b` too; those inside functions as well."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def foreign_imports(code: str, allowed: set[str]) -> set[str]:
    """Imports of graphopt that `allowed` does not cover.

    A relative import counts as foreign: it would work or fail with the place of the folder.
    """
    return {
        name
        for name in imported_names(code)
        if name.split(".")[0] in ("graphopt", "")
        and not any(name == target or name.startswith(f"{target}.") for target in allowed)
    }


@pytest.mark.parametrize("package", sorted(ARROWS))
def test_imports_point_one_way(package: str) -> None:
    files = [(n, p) for n, p in sources() if n == package or n.startswith(f"{package}.")]
    assert files
    for name, path in files:
        assert not foreign_imports(path.read_text(), ARROWS[package]), name


def test_every_room_has_its_arrows() -> None:
    rooms = {".".join(name.split(".")[:2]) for name, _ in sources()} - {"graphopt"}
    assert rooms == set(ARROWS)
    assert {path.stem for path in (ROOT / "graphopt").glob("*.py")} == FLAT


@pytest.mark.parametrize("room", sorted(NEVER))
def test_a_room_does_not_know(room: str) -> None:
    for name, path in sources():
        if name.startswith(f"{room}."):
            assert not imported(path.read_text()) & NEVER[room], name


@pytest.mark.parametrize("room", sorted(LEAN))
def test_the_ground_floor_is_lean(room: str) -> None:
    for name, path in sources():
        if name.startswith(f"{room}."):
            tops = {module.split(".")[0] for module in imported(path.read_text())}
            assert tops - sys.stdlib_module_names - {"graphopt"} <= LEAN[room], name


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from graphopt.runtime import Engine", {"graphopt.runtime.Engine"}),
        ("def f():\n    import graphopt.codegen.cpu", {"graphopt.codegen.cpu"}),
        ("from graphopt import compile", {"graphopt.compile"}),
        ("from . import base", {"..base"}),
        ("import graphopt", {"graphopt"}),
        ("from graphopt.passes.base import Pass\nimport graphopt_extra, torch", set()),
    ],
)
def test_a_wrong_import_is_found(code: str, found: set[str]) -> None:
    assert foreign_imports(code, ARROWS["graphopt.passes"]) == found


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that holds what the wheel installs, and nothing else.

    Built from a copy: setuptools puts whatever an earlier build left in `build/` into the wheel.
    """
    scratch = tmp_path_factory.mktemp("wheel")
    copy, site = scratch / "copy", scratch / "site"
    copy.mkdir()
    for folder in PARTS.values():
        shutil.copytree(folder, copy / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for path in MODULES.values():
        shutil.copy(path, copy)
    command = [sys.executable, "-m", "pip", "wheel", str(copy), "--no-deps"]
    command += ["--no-build-isolation", "-q", "-w", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def test_the_wheel_holds_the_tree_and_nothing_else(installed: Path) -> None:
    expected = {"graphopt/py.typed", *(path.name for path in MODULES.values())}
    for package, folder in PARTS.items():
        for path in folder.rglob("*"):
            if path.suffix in {".py", ".cpp", ".h"}:
                inside = path.relative_to(folder).as_posix()
                expected.add(f"{package.replace('.', '/')}/{inside}")
    for path in (ROOT / "graphopt" / "inspect" / "explorer").rglob("*"):
        if path.suffix in {".html", ".css", ".js", ".LICENSE", ".md"}:
            expected.add(path.relative_to(ROOT).as_posix())
    files = {p.relative_to(installed).as_posix() for p in installed.rglob("*") if p.is_file()}
    assert {name for name in files if ".dist-info/" not in name} == expected
    tops = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert tops == {"graphopt", "graphopt_pytest.py"}


def test_a_users_own_packages_keep_working(installed: Path, tmp_path: Path) -> None:
    for name in ("passes", "models", "runtime", "codegen"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"MINE = {name!r}\n")
    code = (
        "import passes, models, runtime, codegen\n"
        "import graphopt.passes, graphopt.models, graphopt.runtime, graphopt.codegen.backend\n"
        "from graphopt.passes.registry import all_passes\n"
        "for mine in (passes, models, runtime, codegen):\n"
        "    assert mine.MINE == mine.__name__\n"
        "    ours = getattr(graphopt, mine.__name__)\n"
        "    assert not hasattr(ours, 'MINE'), ours\n"
        f"    assert ours.__file__.startswith({str(installed)!r}), ours\n"
        "assert 'fuse_attention' in all_passes()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=child_environment(PYTHONPATH=str(installed)),
        check=False,
    )
    assert done.returncode == 0, done.stderr


def broken_rules(name: str, code: str) -> set[str]:
    """Which house rules a module breaks."""
    return set(_broken_rules(name, code, ast.parse(code)))


def _broken_rules(name: str, code: str, tree: ast.Module) -> Iterator[str]:
    if len(code.splitlines()) > (400 if name.startswith("graphopt.passes") else 600):
        yield "too long"
    if ast.get_docstring(tree) is None:
        yield "no docstring"
    for node in ast.walk(tree):
        is_call = isinstance(node, ast.Call)
        if is_call and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield "prints"
        if is_call and isinstance(node.func, ast.Attribute) and node.func.attr == "call_function":
            yield "makes a node"
        reads = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
        imported = isinstance(node, ast.ImportFrom) and node.module == "os"
        if reads or (imported and {a.name for a in node.names} & {"environ", "getenv"}):
            yield "reads the environment"


ALLOWED = {
    "graphopt.config": {"reads the environment"},
    "graphopt.ir.builder": {"makes a node"},
}


@pytest.mark.parametrize("package", sorted(PARTS))
def test_house_rules(package: str) -> None:
    files = [(n, p) for n, p in sources() if p.is_relative_to(PARTS[package])]
    assert files
    for name, path in files:
        assert broken_rules(name, path.read_text()) == ALLOWED.get(name, set()), name
    for path in PARTS[package].rglob("*"):
        is_ours = path.suffix in {".cpp", ".h", ".css", ".js"} and "vendor" not in path.parts
        if is_ours:
            assert len(path.read_text().splitlines()) <= 600, path


@pytest.mark.parametrize("module", sorted(MODULES))
def test_house_rules_of_modules_beside_the_package(module: str) -> None:
    assert broken_rules(module, MODULES[module].read_text()) == set()


@pytest.mark.parametrize(
    ("code", "broken"),
    [
        ("x = 1", {"no docstring"}),
        ('"""Doc."""\nprint(1)', {"prints"}),
        ('"""Doc: os.environ, print(1)."""\n# print(1)', set()),
        ('"""Doc."""\nimport os\nos.getenv("A")', {"reads the environment"}),
        ('"""Doc."""\nfrom os import environ', {"reads the environment"}),
        ('"""Doc."""\ngraph.call_function(f, ())', {"makes a node"}),
        ('"""Doc."""\n' + "x = 1\n" * 400, {"too long"}),
        ('"""Doc."""\n' + "x = 1\n" * 399, set()),
    ],
)
def test_a_broken_rule_is_found(code: str, broken: set[str]) -> None:
    assert broken_rules("graphopt.passes.fuse.example", code) == broken
