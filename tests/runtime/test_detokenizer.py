"""Streaming text: pieces make up the whole, no half characters, stop texts across tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest
from paged_fake import ByteTokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from graphopt.runtime.detokenizer import Detokenizer

TEXTS = (
    "plain ascii",
    "Grüße, naïve café",
    "漢字かな交じり文",
    "emoji 👩‍👩‍👧 family 🏳️‍🌈!",
    "a\u0301 combining \u200b zero width",
    "already \ufffd replaced \ufffd\ufffd",
    "",
)


def sentencepiece() -> Any:
    """A Llama-like tokenizer: '▁' for spaces, bytes for what the vocabulary lacks."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁Paris", "▁is", "▁nice", "Hello", "é", "▁▁", ".", "漢"]
    model = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[],
        byte_fallback=True,
        unk_token="<unk>",
    )
    raw = Tokenizer(model)
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def pieces_of(detokenizer: Detokenizer, tokens: list[int]) -> list[str]:
    return [*(detokenizer.push(token) for token in tokens), detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_become_whole_characters(text: str) -> None:
    tokenizer = ByteTokenizer()
    detokenizer = Detokenizer(tokenizer)
    pieces = pieces_of(detokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text == detokenizer.text
    if "\ufffd" not in text:
        # Each character is given at its last byte and no later.
        assert pieces[:-1] == [piece for c in text for piece in [""] * (len(c.encode()) - 1) + [c]]


def test_random_bytes_make_up_what_decoding_at_once_gives() -> None:
    tokenizer = ByteTokenizer()
    parts = [*"aé漢👩".encode(), 0xFF, 0xC3, 0xF0, 0x80, 300]
    for _ in range(300):
        tokens = random.choices(parts, k=random.randint(0, 40))
        detokenizer = Detokenizer(tokenizer)
        pieces = pieces_of(detokenizer, tokens)
        whole = tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert "".join(pieces) == detokenizer.text == whole


@pytest.mark.parametrize("tokens", [[300] * 2000, [0xFF] * 2000], ids=["special", "garbage"])
def test_work_does_not_grow_with_tokens_that_are_no_text(tokens: list[int]) -> None:
    tokenizer = ByteTokenizer()
    detokenizer = Detokenizer(tokenizer)
    pieces_of(detokenizer, tokens)
    assert tokenizer.decoded < 100 * len(tokens)


def test_a_character_cut_by_the_end_is_given_as_decoding_gives_it() -> None:
    detokenizer = Detokenizer(ByteTokenizer())
    pieces = pieces_of(detokenizer, list("aé".encode())[:-1])
    assert pieces == ["a", "", "\ufffd"]


def test_a_character_begun_by_the_prompt_belongs_to_the_text() -> None:
    first, second = "é".encode()
    detokenizer = Detokenizer(ByteTokenizer(), prompt=[97, first])
    assert pieces_of(detokenizer, [second, 98]) == ["é", "b", ""]


def test_sentencepiece_keeps_the_space_after_the_prompt() -> None:
    tokenizer = sentencepiece()
    ids = tokenizer.convert_tokens_to_ids
    prompt = ids(["<s>", "Hello"])
    tokens = ids(["▁Paris", "▁is", "▁▁", "é", "<0xF0>", "<0x9F>", "<0x91>", "<0xA9>", "</s>", "."])
    pieces = pieces_of(Detokenizer(tokenizer, prompt), tokens)
    assert pieces == [" Paris", " is", "  ", "é", "", "", "", "👩", "", ".", ""]


def test_sentencepiece_random_tokens_equal_decoding_at_once() -> None:
    tokenizer = sentencepiece()
    ids = tokenizer.convert_tokens_to_ids
    units = [["▁Paris"], ["é"], ["."], ["漢"], ["▁nice"], ["<0xC3>", "<0xA9>"], ["</s>"]]
    units.append([f"<0x{byte:02X}>" for byte in "👩".encode()])
    prompt = ids(["<s>", "Hello"])
    for _ in range(100):
        tokens = [t for unit in random.choices(units, k=12) for t in ids(unit)]
        detokenizer = Detokenizer(tokenizer, prompt)
        whole = tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)
        assert "Hello" + "".join(pieces_of(detokenizer, tokens)) == whole


@pytest.mark.parametrize(
    ("text", "stop", "result"),
    [
        ("one STOP two", ("STOP",), "one "),
        ("one STOP", ("STOP",), "one "),
        ("STOP", ("STOP",), ""),
        ("SSTOP", ("STOP",), "S"),
        ("STSTOP", ("STOP",), "ST"),
        ("aabaac", ("aabaaa", "aac"), "aab"),
        ("first second", ("second", "st"), "fir"),
        ("abcd", ("bcd", "abc"), ""),
        ("a é漢 b", ("漢",), "a é"),
        ("a é漢 b", ("é漢 b",), "a "),
        ("no stop here", ("STOP",), "no stop here"),
        ("ends in ST", ("STOP",), "ends in ST"),
        ("\n\nUser: hi", ("\n\nUser:", "\n\nAssistant:"), ""),
    ],
)
def test_stop_texts(text: str, stop: tuple[str, ...], result: str) -> None:
    tokenizer = ByteTokenizer()
    detokenizer = Detokenizer(tokenizer, stop=stop)
    given = ""
    for token in tokenizer.encode(text):
        given += detokenizer.push(token)
        # Nothing that was given has to be taken back.
        assert result.startswith(given)
        if detokenizer.stopped:
            break
    given += detokenizer.finish()
    assert given == detokenizer.text == result
    assert detokenizer.stopped == any(s in text for s in stop)
    if detokenizer.stopped:
        assert detokenizer.push(97) == ""


def test_stop_texts_at_random_token_borders() -> None:
    class Pieces:
        """Token = index into a list of texts."""

        def __init__(self, texts: list[str]) -> None:
            self.texts = texts

        def decode(self, ids: list[int], **_: bool) -> str:
            return "".join(self.texts[i] for i in ids)

    for _ in range(500):
        text = "".join(random.choices("ab", k=random.randint(1, 14)))
        stop = tuple({"".join(random.choices("ab", k=random.randint(1, 4))) for _ in range(2)})
        cuts = sorted(random.sample(range(1, len(text) + 1), random.randint(1, len(text))))
        texts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        texts = [t for t in texts if t]
        detokenizer = Detokenizer(Pieces(texts), stop=stop)
        given = ""
        for token in range(len(texts)):
            given += detokenizer.push(token)
            if detokenizer.stopped:
                break
        given += detokenizer.finish()
        # Tokens after the one that completed a stop text were never made.
        seen = "".join(texts[: token + 1])
        ends = [seen.find(s) for s in stop if s in seen]
        assert given == seen[: min(ends, default=len(seen))]
        assert detokenizer.stopped == bool(ends)
