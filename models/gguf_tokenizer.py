"""The tokenizer inside a GGUF file, converted once and cached.

transformers converts it from the vocabulary, merges and chat template in the metadata. That takes
seconds, so the converted folder is kept in `<cache>/tokenizers/`, keyed by the digest of the file's
header (which holds all of them) and the transformers version.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer

from graphopt.config import Config
from graphopt.models.gguf_file import GgufFile


def load_tokenizer(file: GgufFile, config: Config) -> Any:
    """The file's tokenizer as a Hugging Face one, or None when the file has none.

    A tokenizer that transformers cannot convert gives a warning and None: the model still works on
    token ids.
    """
    if "tokenizer.ggml.tokens" not in file.metadata:
        return None
    key = f"{file.header_sha256[:24]}-{transformers.__version__}"
    folder = config.cache / "tokenizers" / key
    if not folder.is_dir():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(file.path.parent), gguf_file=file.path.name, local_files_only=True
            )
        # Whatever the converter stumbles on, the weights are still usable.
        except Exception as error:
            warnings.warn(
                f"no tokenizer: transformers could not convert the one in {file.path}: {error}",
                stacklevel=2,
            )
            return None
        _save(tokenizer, folder)
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def _save(tokenizer: Any, folder: Path) -> None:
    """Write the folder in one step, so that no other process sees half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        tokenizer.save_pretrained(str(scratch))
        try:
            scratch.rename(folder)
        except OSError:
            # Another process was first; its folder has the same content.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
