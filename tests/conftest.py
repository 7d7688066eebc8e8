"""Makes the shared test helpers importable whatever folder pytest starts in; skips the longest.

Every graph text that any test's compilation records is read back and compared (GRAPHOPT_REREAD).
"""

import logging
import os
import sys
from pathlib import Path

import pytest
import torch

pytest_plugins = ["pytester"]
sys.path.append(str(Path(__file__).parent))
os.environ["GRAPHOPT_REREAD"] = "1"
# pytest 9.2 attaches its handler to loggers that do not propagate, and torch writes its structured
# trace, a sixth of the time of an export, as soon as this one has a handler: it is not to be found.
assert torch.__version__
logging.root.manager.loggerDict.pop("torch.__trace", None)


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
