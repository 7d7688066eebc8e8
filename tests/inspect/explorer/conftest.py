"""Compiled tiny models, their pages, and a browser that has no network."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import tiny_llama
from torch import Tensor, nn
from watched_page import Watched

import graphopt
from graphopt.inspect.explorer.data import page_data
from graphopt.inspect.explorer.subject import subject_of
from graphopt.program.program import Program

FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="session")
def program() -> Program:
    return graphopt.compile(tiny_llama(4), backend="reference")


class ReturnsWeights(nn.Module):
    """Attention whose probabilities have another use, which fuse_attention leaves alone."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        weights_BSS = torch.softmax(x_BSD @ x_BSD.transpose(-2, -1) * 0.125, -1)
        return weights_BSS @ x_BSD + weights_BSS.sum()


@pytest.fixture(scope="session")
def rejected() -> Program:
    return graphopt.compile(ReturnsWeights().eval(), torch.randn(2, 6, 32), serving="off")


@pytest.fixture(scope="session")
def data(program: Program) -> dict[str, Any]:
    return page_data(subject_of(program), batch=2, sequence=32)


@pytest.fixture(scope="session")
def page_file(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "tiny.html"
    return graphopt.explore(program, out, batch=2, sequence=32)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=chromium, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any, page_file: Path) -> Iterator[Any]:
    watched = Watched(browser, page_file)
    yield watched.page
    watched.close()


@pytest.fixture(scope="session")
def projection() -> nn.Module:
    """A model of a user's own, without layers that have numbers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()


@pytest.fixture
def screenshot(request: pytest.FixtureRequest) -> Callable[[Any, str], None]:
    """Writes `docs/images/explorer_<name>.png` with --screenshots, else does nothing."""
    folder = Path(__file__).parents[3] / "docs" / "images"

    def take(page: Any, name: str) -> None:
        if request.config.getoption("--screenshots"):
            folder.mkdir(exist_ok=True)
            page.wait_for_timeout(300)
            page.screenshot(path=folder / f"explorer_{name}.png")

    return take
