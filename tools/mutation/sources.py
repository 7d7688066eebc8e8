"""The files of each area, their module names, and an import hook that gives a module other code."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import CodeType, ModuleType

ROOT = Path(__file__).resolve().parent.parent.parent
AREAS = {
    "masks": "passes/masks/*.py",
    "fuse": "passes/fuse/*.py",
    "cpu": "codegen/cpu/*.py",
    "ir": "graphopt/ir/*.py",
    "ops": "graphopt/ops/*.py",
    "storage": "graphopt/storage.py graphopt/bisection.py graphopt/numerics.py",
    "cleanup": "passes/cleanup/*.py",
    "cache": "passes/cache/*.py",
    "runtime": "runtime/*.py",
}
DEFAULT_AREAS = ("masks", "fuse", "cpu", "ir", "ops", "storage")
# Installed as `graphopt.passes` and so on.
_PARTS = ("passes", "codegen", "runtime", "models")


def files(area: str) -> list[Path]:
    """The files of an area, relative to the root."""
    found = (path for pattern in AREAS[area].split() for path in sorted(ROOT.glob(pattern)))
    return [path.relative_to(ROOT) for path in found if path.name != "__init__.py"]


def module_name(path: Path) -> str:
    """`passes/masks/bits.py` is imported as `graphopt.passes.masks.bits`."""
    parts = path.with_suffix("").parts
    return ".".join(("graphopt", *parts) if parts[0] in _PARTS else parts)


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles what `code` makes of the file, and neither reads nor writes bytecode files."""

    def __init__(self, name: str, path: str, code: Callable[[str], CodeType]) -> None:
        super().__init__(name, path)
        self._code = code

    def get_code(self, fullname: str) -> CodeType:
        return self._code(Path(self.path).read_text())


class Hook(MetaPathFinder):
    """Gives modules other code than their files hold: `codes`, by path relative to the root."""

    def __init__(self, codes: dict[str, Callable[[str], CodeType]]) -> None:
        self._codes = {module_name(Path(path)): (path, code) for path, code in codes.items()}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See importlib.abc.MetaPathFinder."""
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
