"""The files of each area, their module names, and an import hook that gives a module other code."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import CodeType, ModuleType

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True, slots=True)
class Area:
    """Patterns of source files, and the tests to run for them: files or folders, blanks between."""

    sources: str
    tests: str


AREAS = {
    "masks": Area("passes/analysis/masks/*.py", "tests/passes/analysis/masks tests/passes/fuse"),
    "fuse": Area("passes/fuse/**/*.py", "tests/passes/fuse"),
    "ir": Area(
        "graphopt/ir/**/*.py",
        "tests/ir tests/passes/cleanup tests/record/test_diff.py tests/capture/test_bounds.py",
    ),
    "ops": Area(
        "graphopt/ops/*.py", "tests/ops tests/cost/test_flops_bytes.py tests/passes/analysis/masks"
    ),
    "storage": Area(
        "graphopt/program/save.py graphopt/check/bisect.py graphopt/check/numerics.py",
        "tests/program/test_save.py tests/check/test_bisect.py tests/check/test_numerics.py "
        "tests/program/test_program.py",
    ),
    "cpu": Area("codegen/cpu/*.py", "tests/codegen"),
    "cleanup": Area("passes/cleanup/*.py", "tests/passes/cleanup"),
    "cache": Area("passes/cache/*.py passes/analysis/rows/*.py", "tests/passes/cache"),
    "runtime": Area("runtime/*.py", "tests/runtime"),
}
DEFAULT_AREAS = ("masks", "fuse", "ir", "ops", "storage", "cpu")
# Installed as `graphopt.passes` and so on.
_PARTS = ("passes", "codegen", "runtime", "models")


def files(area: str) -> list[Path]:
    """The files of an area, relative to the root."""
    found = (path for pattern in AREAS[area].sources.split() for path in sorted(ROOT.glob(pattern)))
    return [path.relative_to(ROOT) for path in found if path.name != "__init__.py"]


def module_name(path: Path) -> str:
    """`passes/analysis/masks/bits.py` is imported as `graphopt.passes.analysis.masks.bits`."""
    parts = path.with_suffix("").parts
    return ".".join(("graphopt", *parts) if parts[0] in _PARTS else parts)


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles what `code` makes of the file, and neither reads nor writes bytecode files."""

    def __init__(self, name: str, path: str, code: Callable[[str], CodeType]) -> None:
        super().__init__(name, path)
        self._code = code

    def get_code(self, fullname: str) -> CodeType:
        del fullname
        return self._code(Path(self.path).read_text())


class Hook(MetaPathFinder):
    """Gives modules other code than their files hold: `codes`, by path relative to the root."""

    def __init__(self, codes: dict[str, Callable[[str], CodeType]]) -> None:
        self._codes = {module_name(Path(path)): (path, code) for path, code in codes.items()}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See importlib.abc.MetaPathFinder."""
        del path, target
        if fullname not in self._codes:
            return None
        file, code = self._codes[fullname]
        where = str(ROOT / file)
        return importlib.util.spec_from_file_location(
            fullname, where, loader=_Loader(fullname, where, code)
        )

    def install(self) -> None:
        """Before anything of the package is imported."""
        assert not any(name in sys.modules for name in self._codes), "imported already"
        sys.meta_path.insert(0, self)
