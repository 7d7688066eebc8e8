"""The cuts of each pre-tokenizer: transformers' own for the same tokenizer, and examples."""

from __future__ import annotations

import random

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from graphopt.models.gguf.pretokenizer import DEFAULT, PRE_TOKENIZERS, PreTokenizer

POOL = [
    *"aZé日ḿ ḱß 19½²'.,!?$<=>`~_-(\n\r\t",
    "  ",
    "'s",
    "'LL",
    "don't",
    " The",
    "123",
    "\u0301",
    "😀",
]


def cutter(cuts: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(text), "isolated") for text in cuts.expressions]
    )


def pieces(cutter: pre_tokenizers.PreTokenizer, text: str) -> list[str]:
    return [piece for piece, _ in cutter.pre_tokenize_str(text)]


def spans(cutter: pre_tokenizers.PreTokenizer, text: str) -> list[tuple[int, int]]:
    return [span for _, span in cutter.pre_tokenize_str(text)]


def texts(count: int = 400) -> list[str]:
    generator = random.Random()
    return ["".join(generator.choices(POOL, k=generator.randint(1, 25))) for _ in range(count)]


@pytest.mark.parametrize("name", sorted(GGUF_PRE_TOKENIZER_SPLITS.keys() & PRE_TOKENIZERS.keys()))
def test_cuts_are_those_of_transformers(name: str) -> None:
    theirs = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated")
    ours = cutter(PRE_TOKENIZERS[name])
    for text in texts():
        assert pieces(ours, text) == pieces(theirs, text), repr(text)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("gpt-2", []),
        ("smollm", [pre_tokenizers.Digits(individual_digits=True)]),
        ("starcoder", [pre_tokenizers.Digits(individual_digits=True)]),
    ],
)
def test_cuts_are_those_of_the_models_own_tokenizers(
    name: str, steps: list[pre_tokenizers.PreTokenizer]
) -> None:
    """Their tokenizer.json: single digits before GPT-2's expression, or that alone."""
    theirs = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    spelled = pre_tokenizers.Sequence(
        [
            cutter(PRE_TOKENIZERS[name]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for text in texts():
        assert pieces(spelled, text) == pieces(theirs, text), repr(text)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("gpt-2", "I'S 1234 ab", ["I", "'", "S", " 1234", " ab"]),
        ("smollm", "a1234", ["a", "1", "2", "3", "4"]),
        ("command-r", "x 12", ["x", " ", "1", "2"]),
        ("llama-bpe", "12345 I'LL", ["123", "45", " I", "'LL"]),
        ("qwen2", "123 a", ["1", "2", "3", " a"]),
        ("tekken", "HelloWorld 12", ["Hello", "World", " ", "1", "2"]),
        ("gpt-4o", "HelloWorld's 1234", ["Hello", "World's", " ", "123", "4"]),
        ("falcon", "a+b 12345", ["a", "+", "b", " ", "123", "45"]),
        ("deepseek-coder", "if x:\n12", ["if", " x", ":", "\n", "1", "2"]),
        ("deepseek-v3", "(foo 1234日本", ["(foo", " ", "123", "4", "日本"]),
        ("viking", "ab, c1", ["ab", ",", " c", "1"]),
    ],
)
def test_examples(name: str, text: str, expected: list[str]) -> None:
    assert pieces(cutter(PRE_TOKENIZERS[name]), text) == expected


@pytest.mark.parametrize("name", ["default", *sorted(PRE_TOKENIZERS)])
def test_nothing_of_a_text_is_lost(name: str) -> None:
    ours = cutter(DEFAULT if name == "default" else PRE_TOKENIZERS[name])
    for text in texts(60):
        assert "".join(pieces(ours, text)) == text
        covered = [place for start, end in spans(ours, text) for place in range(start, end)]
        assert covered == list(range(len(text)))
