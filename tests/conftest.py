"""Makes the shared test helpers importable whatever folder pytest starts in; skips the longest.

Every graph text that any test's compilation records is read back and compared (GRAPHOPT_REREAD).
"""

import os
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
sys.path.append(str(Path(__file__).parent))
os.environ["GRAPHOPT_REREAD"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--exhaustive`: run the tests that take many minutes, too. `--screenshots`: of the explorer,
    for the documentation."""
    parser.addoption("--exhaustive", action="store_true", help="run the tests so marked")
    parser.addoption(
        "--screenshots", action="store_true", help="write docs/images/explorer_*.png anew"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Exhaustive tests are skipped, with the reason, unless they were asked for."""
    if config.getoption("--exhaustive"):
        return
    skip = pytest.mark.skip(reason="takes many minutes: run with --exhaustive")
    for item in items:
        if "exhaustive" in item.keywords:
            item.add_marker(skip)
