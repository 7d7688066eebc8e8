"""A folder of tokenizer files as a Hugging Face tokenizer, whoever wrote them.

Every JSON file is read by `json_file` first, then transformers has them. What its parsers raise,
in Python or in Rust, becomes the error class that the caller names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from graphopt.errors import GraphoptError
from graphopt.files.json_file import read_json
from graphopt.models.schema import TEXT, Rule, check_all, one_line

_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "config.json", "chat_template.json", "processor_config.json"),
)
_RULES = {
    # Those without a limit say 1e30.
    "model_max_length": Rule("number", 0, 1e31),
    **dict.fromkeys(("padding_side", "truncation_side"), TEXT),
}
_TRIAL = "a b"


def read_tokenizer(folder: Path, error: type[GraphoptError], remedy: str) -> Any:
    """The tokenizer in `folder`, after it was seen to work. Raises `error`; remedy: the end of its
    text."""
    try:
        for path in sorted(folder / name for name in _FILES):
            if path.exists():
                settings = read_json(path, error)
                if path.name == "tokenizer_config.json" and isinstance(settings, dict):
                    check_all(path, settings, _RULES)
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
        # Some settings are looked at for the first time when they are used.
        tokenizer.decode(tokenizer.encode(_TRIAL))
        return tokenizer
    # transformers raises whatever its parsers do, and a panic of those in Rust is no Exception.
    except BaseException as failure:
        if not isinstance(failure, Exception) and type(failure).__name__ != "PanicException":
            raise
        raise error(
            f"the tokenizer of {folder} could not be read: {one_line(failure)}; {remedy}"
        ) from failure
