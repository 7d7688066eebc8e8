"""The tokenizer inside a GGUF file, converted once and cached.

Rule: a `tokenizer.*` key is read, known to change nothing, or the file's tokenizer is not used and
a warning names the key and its value: the model itself still works on token ids. Two kinds are read
(`tokenizer.ggml.model`): byte-level BPE ("gpt2"), built here from vocabulary, merges and the
cuts that `tokenizer.ggml.pre` names, and SentencePiece ("llama"), converted by transformers.

Converting takes seconds, so the result is kept in `<cache>/tokenizers/`, keyed by the digest of the
file's header (which holds all of it), the transformers version and the revision of this code.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from graphopt.config import Config
from graphopt.errors import WeightFormatError
from graphopt.models.gguf.file import GgufFile
from graphopt.models.gguf.pretokenizer import DEFAULT, PRE_TOKENIZERS, PreTokenizer
from graphopt.models.schema import short
from graphopt.models.tokenizer_folder import read_tokenizer

_REVISION = 2
_CONTROL, _USER_DEFINED = 3, 4
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
READ = frozenset(
    {
        *("model", "pre", "tokens", "token_type", "scores", "merges", *_SPECIAL.values()),
        *("add_bos_token", "add_eos_token", "add_space_prefix"),
        # By the reader of the model.
        *("eot_token_id", "eom_token_id", "suppress_tokens"),
    }
)
HARMLESS = frozenset(
    {
        # Names of tokens for particular uses; they are in the vocabulary like any other.
        *("seperator_token_id", "mask_token_id", "cls_token_id", "fim_pre_token_id"),
        *("fim_suf_token_id", "fim_mid_token_id", "fim_pad_token_id", "fim_rep_token_id"),
        *("fim_sep_token_id", "prefix_token_id", "suffix_token_id", "middle_token_id"),
        # Segments of an encoder's input.
        "token_type_count",
    }
)
OFF = frozenset(
    {
        *("add_sep_token", "remove_extra_whitespaces", "precompiled_charsmap"),
        *("normalizer.lowercase", "normalizer.strip_accents"),
    }
)
"""Accepted when false or empty."""
_GGML = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_SPACE = "▁"
# The same tokenizer once more, in another program's format.
_DUPLICATE = "tokenizer.huggingface.json"


class _NotReadError(WeightFormatError):
    """Why this tokenizer cannot be used."""


def load_tokenizer(file: GgufFile, config: Config) -> Any:
    """The file's tokenizer as a Hugging Face one, or None when the file has none.

    A tokenizer that cannot be converted faithfully gives a warning and None.
    """
    if f"{_GGML}tokens" not in file.metadata:
        return None
    key = f"{file.header_sha256[:24]}-{transformers.__version__}-{_REVISION}"
    folder = config.cache / "tokenizers" / key
    try:
        _check_keys(file)
        return _kept(file, folder)
    except _NotReadError as error:
        warnings.warn(f"no tokenizer: {file.path} {error}; the model takes token ids", stacklevel=2)
        return None


def _kept(file: GgufFile, folder: Path) -> Any:
    """The tokenizer that lies in `folder`, converted first where there is none or a damaged one."""
    if folder.is_dir():
        with suppress(_NotReadError):
            return read_tokenizer(folder, _NotReadError, "")
        shutil.rmtree(folder, ignore_errors=True)
    converted = _convert(file)
    try:
        _save(converted, folder)
    except OSError as error:
        warnings.warn(f"the converted tokenizer is not kept: {error}", stacklevel=3)
        with tempfile.TemporaryDirectory() as scratch:
            converted.save_pretrained(scratch)
            return read_tokenizer(Path(scratch), _NotReadError, "")
    return read_tokenizer(folder, _NotReadError, "")


def _check_keys(file: GgufFile) -> None:
    for key, value in file.metadata.items():
        if not key.startswith("tokenizer.") or key == _DUPLICATE:
            continue
        name = key.removeprefix(_GGML)
        is_known = name in READ or name in HARMLESS or key.startswith(_TEMPLATE)
        if not is_known and (name not in OFF or value):
            raise _NotReadError(f"has {key}={short(value)}, which graphopt does not read")
    kind = file.metadata.get(f"{_GGML}model")
    if kind not in ("gpt2", "llama"):
        raise _NotReadError(f"has {_GGML}model={kind!r}; 'gpt2' and 'llama' are read")
    if kind == "gpt2":
        _pre_tokenizer(file)


def _convert(file: GgufFile) -> Any:
    is_bpe = file.metadata[f"{_GGML}model"] == "gpt2"
    try:
        tokenizer = _byte_level(file) if is_bpe else _sentence_piece(file)
        templates = _chat_templates(file)
        if templates:
            tokenizer.chat_template = templates
        return tokenizer
    except _NotReadError:
        raise
    # Whatever the converters stumble on, the weights are still usable; a panic of those in Rust is
    # no Exception.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise _NotReadError(f"has a tokenizer that could not be converted: {error!r}") from error


def _pre_tokenizer(file: GgufFile) -> PreTokenizer:
    name = file.metadata.get(f"{_GGML}pre", "default")
    if name == "default":
        warnings.warn(
            f"{file.path} does not say how its tokenizer cuts text ({_GGML}pre); as in llama.cpp a "
            "default is used, which may not be what the model was trained with",
            stacklevel=4,
        )
        return DEFAULT
    if name not in PRE_TOKENIZERS:
        raise _NotReadError(
            f"has {_GGML}pre={name!r}, a way to cut text that graphopt does not know; it knows "
            f"{', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return PRE_TOKENIZERS[name]


def _byte_level(file: GgufFile) -> Any:
    """Byte-level BPE: the vocabulary, the merges and the added tokens as the file has them."""
    meta = file.metadata
    tokens: list[str] = meta[f"{_GGML}tokens"]
    cuts = _pre_tokenizer(file)
    if meta.get(f"{_GGML}add_space_prefix", False):
        raise _NotReadError(f"has {_GGML}add_space_prefix=True for a byte-level tokenizer")
    merges = [_pair(merge) for merge in meta[f"{_GGML}merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise _NotReadError(f"has a token twice in {_GGML}tokens")
    backend = Tokenizer(BPE(vocabulary, merges, ignore_merges=cuts.ignore_merges))
    steps = [pre_tokenizers.Split(Regex(text), "isolated") for text in cuts.expressions]
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, spelling])
    backend.decoder = decoders.ByteLevel()
    types = meta.get(f"{_GGML}token_type", [])
    if types and len(types) != len(tokens):
        raise _NotReadError(f"has {len(tokens)} tokens and {len(types)} {_GGML}token_type")
    for index, type_ in enumerate(types):
        if type_ in (_CONTROL, _USER_DEFINED):
            added = AddedToken(tokens[index], normalized=False, special=type_ == _CONTROL)
            (backend.add_special_tokens if type_ == _CONTROL else backend.add_tokens)([added])
    special = {
        role: tokens[meta[_GGML + key]] for role, key in _SPECIAL.items() if _GGML + key in meta
    }
    frame = [
        special[role] if meta.get(f"{_GGML}add_{role}", False) else None
        for role in ("bos_token", "eos_token")
    ]
    if any(frame):
        backend.post_processor = _framed(frame, vocabulary)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special
    )


def _framed(frame: list[str | None], vocabulary: dict[str, int]) -> Any:
    """Puts the first token before every text and the second behind it; None puts nothing."""
    begin, end = ([] if token is None else [token] for token in frame)
    return processors.TemplateProcessing(
        single=[*begin, "$A", *end],
        pair=[*begin, "$A", *end, *begin, "$B:1", *end],
        special_tokens=[(token, vocabulary[token]) for token in {*begin, *end}],
    )


def _sentence_piece(file: GgufFile) -> Any:
    """transformers' conversion, with the space before a text that SentencePiece and llama.cpp put
    there: one more, whatever the text begins with, or none."""
    tokenizer = AutoTokenizer.from_pretrained(
        str(file.path.parent), gguf_file=file.path.name, local_files_only=True
    )
    has_prefix = file.metadata.get(f"{_GGML}add_space_prefix", True)
    backend = tokenizer.backend_tokenizer
    prefix = [normalizers.Prepend(_SPACE)] if has_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    backend.pre_tokenizer = None
    whole = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    backend.decoder = decoders.Sequence([*whole, *strip])
    return tokenizer


def _chat_templates(file: GgufFile) -> str | dict[str, str] | None:
    """One template, or several by name where the file has more than one."""
    default = file.metadata.get(_TEMPLATE)
    named = {
        key.removeprefix(f"{_TEMPLATE}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{_TEMPLATE}.")
    }
    if not named:
        return default
    return named if default is None else {"default": default, **named}


def _pair(merge: str) -> tuple[str, str]:
    # A token may itself begin with the character that divides.
    place = merge.index(" ", 1)
    return merge[:place], merge[place + 1 :]


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
