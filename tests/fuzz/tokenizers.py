"""Small tokenizers of three kinds, for the folders that are damaged."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_WORDS = ("<pad>", "<s>", "</s>", "<unk>", "ab", "c", "d", "▁a", "##b")


def byte_level() -> Any:
    """As GPT-2's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*_WORDS[:3], *letters, "ab"])}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _fast(backend)


def word_pieces() -> Any:
    """As BERT's."""
    vocabulary = {token: index for index, token in enumerate(_WORDS)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _fast(backend)


def unigram() -> Any:
    """As SentencePiece's."""
    backend = Tokenizer(models.Unigram([(word, -float(n)) for n, word in enumerate(_WORDS)], 3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return _fast(backend)


def _fast(backend: Any) -> Any:
    backend.add_special_tokens(list(_WORDS[:3]))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


TOKENIZERS = (byte_level, word_pieces, unigram, lambda: None)
