"""Hugging Face folders and hub names: config.json + safetensors, through transformers.

Contract: nothing that the files say is dropped without a word (rules in `hf_config`, `hf_files` and
`generation_config`), only `*.safetensors` are read (a folder with pickled weights alone is refused,
never opened), code that ships with a model is never run (`trust_remote_code` stays off), and every
parameter must come from the files with the shape the configuration gives it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from graphopt.capture.source import ModelSource
from graphopt.config import Config
from graphopt.errors import ModelNotFoundError, UnsupportedError, WeightFormatError
from graphopt.files.json_file import read_object
from graphopt.models.hf import schema as hf_schema
from graphopt.models.hf.config import check_config, check_quantization
from graphopt.models.hf.files import check_files, check_tensors, places_of
from graphopt.models.hf.generation_config import end_token_ids, generation_defaults
from graphopt.models.hf.weights import check_capacity, read_entries
from graphopt.models.schema import one_line
from graphopt.models.tokenizer_folder import read_tokenizer
from graphopt.models.weight_dtypes import Entry, check_dtypes, check_narrowing

_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_MOST_BYTES = 1 << 24
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def fetch_hub_folder(name: str, config: Config) -> Path:
    """Local snapshot of the hub repository `name`, from huggingface_hub's cache when offline.

    Raises ModelNotFoundError saying what was tried.
    """
    tried = f"no local path {name!r}"
    try:
        return Path(
            snapshot_download(name, allow_patterns=_WANTED, local_files_only=config.offline)
        )
    # huggingface_hub raises its own classes, httpx's and OSError: all mean "could not be had".
    except Exception as error:
        where = (
            "huggingface_hub's local cache only, since GRAPHOPT_OFFLINE is set"
            if config.offline
            else "the Hugging Face hub and its local cache"
        )
        raise ModelNotFoundError(
            f"{name!r} could not be loaded; tried: {tried}; {where} "
            f"({type(error).__name__}: {_first_line(error)}). Check the name, the network and, for "
            "a gated model, `hf auth login`; or give a local folder or .gguf file"
        ) from error


def load_folder(folder: Path, *, name: str, dtype: torch.dtype) -> ModelSource:
    """Load a local folder. Raises ModelNotFoundError, WeightFormatError, UnsupportedError."""
    _check_files(folder)
    notes = check_files(folder)
    entries, told = read_entries(folder)
    settings = _read_settings(folder, len(entries))
    config = _read_config(folder, settings)
    tokenizer = _read_tokenizer(folder)
    model_class = _model_class(folder, config)
    notes += (*told, *_check_class(folder, settings, config, model_class))
    shell = check_capacity(folder, config, model_class, entries)
    notes += check_dtypes(entries, places_of(entries, shell), dtype)
    module, also = _read_module(folder, config, model_class, dtype, entries)
    defaults = generation_defaults(module)
    end_tokens, ending = _end_tokens(module, tokenizer)
    return ModelSource(
        module=module.eval(),
        name=name,
        tokenizer=tokenizer,
        eos_token_ids=end_tokens,
        dtype=dtype,
        sampling=defaults.settings,
        notes=(*notes, *also, *defaults.notes, *ending),
    )


def _check_files(folder: Path) -> None:
    if not any(os.path.lexists(folder / name) for name in ("config.json", "adapter_config.json")):
        files = sorted(folder.glob("*.gguf"))
        hint = f"; did you mean the file {files[0]}?" if files else ""
        raise ModelNotFoundError(f"{folder} has no config.json, so it is no model folder{hint}")
    if any(folder.glob("*.safetensors")) or (folder / "adapter_config.json").exists():
        return
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    raise WeightFormatError(
        f"{folder} has no *.safetensors"
        + (f", only {', '.join(pickled)}" if pickled else "")
        + ". Pickled weights can run code when they are read, so graphopt never opens them. Where "
        "you trust them, convert once: transformers' AutoModelForCausalLM.from_pretrained(folder)"
        ".save_pretrained(folder) writes model.safetensors"
    )


def _read_settings(folder: Path, tensors: int) -> dict[str, Any]:
    """The object in config.json, after the types and ranges in it and beside it were checked."""
    path, generation = folder / "config.json", folder / "generation_config.json"
    settings = read_object(path, WeightFormatError, most_bytes=_MOST_BYTES)
    hf_schema.check_config(path, settings, tensors)
    check_quantization(path, settings)
    if generation.exists():
        # transformers leaves a damaged one out without a word.
        stated = read_object(generation, WeightFormatError, most_bytes=_MOST_BYTES)
        hf_schema.check_generation(generation, stated)
    return settings


def _read_config(folder: Path, settings: Mapping[str, Any]) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    # Every configuration class checks its own values and raises what it likes.
    except Exception as error:
        if "auto_map" in settings:
            raise UnsupportedError(
                f"the configuration of {folder} wants code of its own ({settings['auto_map']}); "
                "graphopt never sets trust_remote_code. Build the module yourself and pass it to "
                "graphopt.compile"
            ) from error
        raise UnsupportedError(
            f"transformers {transformers.__version__} cannot read the configuration of {folder}: "
            f"{one_line(error)}"
        ) from error


def _check_class(
    folder: Path, settings: Mapping[str, Any], config: PretrainedConfig, model_class: Any
) -> tuple[str, ...]:
    """Keys of the configuration that the class does not read; see `hf_config`."""
    named = settings.get("architectures")
    concrete = _concrete(config, model_class)
    told = check_config(folder / "config.json", settings, config, concrete)
    if not named or named == [concrete.__name__]:
        return told
    return (*told, f"config.json: architectures={named!r}: loaded as {concrete.__name__}")


def _concrete(config: PretrainedConfig, model_class: Any) -> Any:
    """The class that `model_class` makes of the configuration; an Auto class picks one."""
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is None:
        return model_class
    try:
        return mapping[type(config)]
    except KeyError:
        return model_class


def _end_tokens(module: Any, tokenizer: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Tokens that end generation, and a note where only the tokenizer knows one of them."""
    stated = end_token_ids(module)
    own = getattr(tokenizer, "eos_token_id", None)
    if not isinstance(own, int) or own in stated:
        return stated, ()
    note = f"tokenizer: eos_token {tokenizer.eos_token!r} ({own}) ends generation, too"
    return tuple(sorted({*stated, own})), (note,)


def _read_module(
    folder: Path,
    config: PretrainedConfig,
    model_class: Any,
    dtype: torch.dtype,
    entries: Mapping[str, Entry],
) -> tuple[Any, list[str]]:
    try:
        module, report = model_class.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            # Refused below, by name; transformers' own error does not say which.
            ignore_mismatched_sizes=True,
        )
    # Models are built here too, each with checks of its own.
    except Exception as error:
        raise WeightFormatError(f"the weights of {folder} could not be read: {error}") from error
    unexpected, notes = check_tensors(entries, module, report["unexpected_keys"])
    problems = [
        f"{kind} {sorted(map(str, names))}"
        for kind, names in [
            ("missing", report["missing_keys"]),
            ("unexpected", unexpected),
            ("of another shape", report["mismatched_keys"]),
        ]
        if names
    ]
    if problems:
        raise WeightFormatError(
            f"the tensors of {folder} do not fit {model_class.__name__}: {'; '.join(problems)}"
        )
    check_narrowing(entries, module.parameters(), dtype)
    return module, notes


def _model_class(folder: Path, config: PretrainedConfig) -> Any:
    """What was saved decides the head. A folder that does not say, or that names a class which
    transformers does not have, gets a language model head; its tensors must fit that."""
    names = getattr(config, "architectures", None) or [""]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise WeightFormatError(
            f"{folder / 'config.json'} has architectures={names!r}; it must be a list of class "
            "names, such as ['LlamaForCausalLM']"
        )
    named = getattr(transformers, names[0], None)
    is_model = isinstance(named, type) and issubclass(named, PreTrainedModel)
    return named if is_model else AutoModelForCausalLM


def _read_tokenizer(folder: Path) -> Any:
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    return read_tokenizer(
        folder, WeightFormatError, "mend its files, or remove them to use the model with token ids"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
