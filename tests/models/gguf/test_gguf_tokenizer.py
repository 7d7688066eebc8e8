from pathlib import Path
from typing import Any

import gguf
import pytest
from helpers.gguf_samples import CHAT_TEMPLATE, tiny_llama, write_gguf
from tokenizers.pre_tokenizers import ByteLevel

import graphopt.models.gguf.tokenizer as subject
from graphopt.config import Config
from graphopt.models.gguf.file import GgufFile, open_gguf
from graphopt.models.gguf.tokenizer import load_tokenizer


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(cache=tmp_path / "cache", offline=True)


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "sample.gguf"
    write_gguf(path, tiny_llama(), tokenizer=True)
    return path


def test_encodes_and_decodes(sample: Path, config: Config) -> None:
    tokenizer = load_tokenizer(open_gguf(sample), config)
    # "ab", "Ġa", "cd" are merges 12, 13, 14; "<|im_end|>" is one token.
    assert tokenizer.encode("ab acd<|im_end|>") == [12, 13, 14, 2]
    assert tokenizer.decode([12, 13, 14]) == "ab acd"
    assert tokenizer.eos_token_id == 2
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_is_converted_once(sample: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_tokenizer(open_gguf(sample), config)
    opened: list[dict[str, object]] = []
    original = subject.AutoTokenizer.from_pretrained

    def spy(*args: object, **options: object) -> object:
        opened.append(options)
        return original(*args, **options)

    monkeypatch.setattr(subject.AutoTokenizer, "from_pretrained", spy)
    second = load_tokenizer(open_gguf(sample), config)
    assert [options.get("gguf_file") for options in opened] == [None]
    assert second.get_vocab() == first.get_vocab()
    assert second.chat_template == first.chat_template
    left = [path.name for path in (config.cache / "tokenizers").iterdir()]
    assert len(left) == 1, left


def test_losing_the_race_is_fine(
    sample: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process writes the folder while this one converts."""
    original = subject._save

    def save_twice(tokenizer: object, folder: Path) -> None:
        original(tokenizer, folder)
        original(tokenizer, folder)

    monkeypatch.setattr(subject, "_save", save_twice)
    assert load_tokenizer(open_gguf(sample), config).encode("ab") == [12]
    assert len(list((config.cache / "tokenizers").iterdir())) == 1


def test_file_without_tokenizer(tmp_path: Path, config: Config) -> None:
    path = tmp_path / "none.gguf"
    write_gguf(path, tiny_llama())
    assert load_tokenizer(open_gguf(path), config) is None


def spell(path: Path, old: bytes, new: bytes) -> None:
    """Another text of the same length at every place."""
    assert len(old) == len(new)
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (b"smollm", b"sm0llm", r"tokenizer\.ggml\.pre='sm0llm'.*does not know.*it knows.*smollm"),
        (b"tokenizer.ggml.merges", b"tokenizer.ggml.MERGES", r"tokenizer\.ggml\.MERGES=.*not read"),
        (b"gpt2", b"bert", r"tokenizer\.ggml\.model='bert'; 'gpt2' and 'llama' are read"),
        (b"a b", b"a_b", "could not be converted"),
    ],
)
def test_what_cannot_be_read_is_named(
    sample: Path, config: Config, old: bytes, new: bytes, text: str
) -> None:
    spell(sample, old, new)
    with pytest.warns(UserWarning, match=f"no tokenizer: .*{text}.*; the model takes token ids"):
        assert load_tokenizer(open_gguf(sample), config) is None
    assert not (config.cache / "tokenizers").exists()


def written(path: Path, **settings: Any) -> GgufFile:
    """A file of metadata alone. settings: tokenizer.ggml keys to add; None leaves one out."""
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<s>", "</s>", "<think>", *letters, "12", "34", "1234", "ab"]
    if settings.get("model") == "llama":
        tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "▁ab"]
        types = [2, 3, 3, *[1] * 6]
    else:
        types = [3, 3, 4, *[1] * (len(tokens) - 3)]
    keys: dict[str, Any] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": types,
        "merges": ["1 2", "3 4", "a b"],
        "scores": [-float(n) for n in range(len(tokens))],
        "bos_token_id": tokens.index("<s>"),
        "eos_token_id": tokens.index("</s>"),
        **settings,
    }
    if keys["model"] == "llama":
        keys |= {"merges": None, "pre": None, "unknown_token_id": 0}
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        name = key if key.startswith("tokenizer.") else f"tokenizer.ggml.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
            add[type(value)](name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return open_gguf(path)


def texts_of(file: GgufFile, config: Config, text: str) -> list[str]:
    tokenizer = load_tokenizer(file, config)
    return list(tokenizer.convert_ids_to_tokens(tokenizer.encode(text)))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["ab"]),
        ({"add_bos_token": True}, ["<s>", "ab"]),
        ({"add_eos_token": True}, ["ab", "</s>"]),
        ({"add_bos_token": True, "add_eos_token": True}, ["<s>", "ab", "</s>"]),
        ({"add_bos_token": False, "add_space_prefix": False}, ["ab"]),
        ({"model": "llama"}, ["<s>", "▁ab"]),
        ({"model": "llama", "add_bos_token": False}, ["▁ab"]),
        ({"model": "llama", "add_space_prefix": False}, ["<s>", "ab"]),
        ({"model": "llama", "add_eos_token": True}, ["<s>", "▁ab", "</s>"]),
    ],
)
def test_what_is_put_around_a_text(
    tmp_path: Path, config: Config, settings: dict[str, Any], expected: list[str]
) -> None:
    file = written(tmp_path / "m.gguf", **settings)
    # Once converted, once from the cache.
    assert texts_of(file, config, "ab") == expected
    assert texts_of(file, config, "ab") == expected
    tokenizer = load_tokenizer(file, config)
    assert tokenizer.decode(tokenizer.encode(" ab"), skip_special_tokens=True) == " ab"


def test_pieces_that_are_tokens(tmp_path: Path, config: Config) -> None:
    """Where the vocabulary was made so, a piece is its token even if no merge leads there."""
    tokens = ["<s>", "</s>", "<think>", *sorted(ByteLevel.alphabet()), "ab", "cd"]
    for pre, expected in (("llama-bpe", ["cd"]), ("qwen2", ["c", "d"])):
        file = written(
            tmp_path / f"{pre}.gguf",
            pre=pre,
            tokens=tokens,
            token_type=[3, 3, 4, *[1] * (len(tokens) - 3)],
            merges=["a b"],
        )
        assert texts_of(file, config, "cd") == expected


@pytest.mark.parametrize(
    ("prefix", "text", "expected"),
    [
        (True, " ab", ["<s>", "▁", "▁ab"]),
        (True, "ab ab", ["<s>", "▁ab", "▁ab"]),
        (False, " ab", ["<s>", "▁ab"]),
        (False, "ab", ["<s>", "ab"]),
    ],
)
def test_spaces_before_a_text(
    tmp_path: Path, config: Config, prefix: bool, text: str, expected: list[str]
) -> None:
    file = written(tmp_path / "m.gguf", model="llama", add_space_prefix=prefix)
    assert texts_of(file, config, text) == expected
    tokenizer = load_tokenizer(file, config)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_control_and_user_defined_tokens_are_whole(tmp_path: Path, config: Config) -> None:
    tokenizer = load_tokenizer(written(tmp_path / "m.gguf"), config)
    ids = tokenizer.encode("a<think>b</s>")
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "<think>", "b", "</s>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b"


def test_tokens_outside_the_byte_alphabet(tmp_path: Path, config: Config) -> None:
    """DeepSeek's control tokens hold characters that no byte is spelled with."""
    tokens = ["<｜begin▁of▁sentence｜>", "</s>", "<think>", *sorted(ByteLevel.alphabet())]
    types = [3, 3, 4, *[1] * (len(tokens) - 3)]
    file = written(
        tmp_path / "m.gguf", tokens=tokens, token_type=types, merges=None, bos_token_id=0
    )
    with pytest.warns(UserWarning, match="no tokenizer"):
        assert load_tokenizer(file, config) is None
    merges = [f"{tokens[3]} {tokens[4]}"]
    file = written(
        tmp_path / "n.gguf",
        tokens=[*tokens, tokens[3] + tokens[4]],
        token_type=[*types, 1],
        merges=merges,
        bos_token_id=0,
    )
    tokenizer = load_tokenizer(file, config)
    assert tokenizer.encode("<｜begin▁of▁sentence｜>a")[0] == 0
    assert tokenizer.decode([0]) == "<｜begin▁of▁sentence｜>"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"add_sep_token": True}, "add_sep_token=True"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces=True"),
        ({"precompiled_charsmap": [1, 2]}, "precompiled_charsmap="),
        ({"normalizer.lowercase": True}, "normalizer.lowercase=True"),
        ({"a_key_of_tomorrow": 1}, "a_key_of_tomorrow=1"),
        ({"add_space_prefix": True}, "add_space_prefix=True for a byte-level"),
        ({"token_type": [3, 3]}, "token_type"),
        ({"tokenizer.rwkv.world": "x"}, "rwkv"),
    ],
)
def test_settings_that_are_not_read_are_named(
    tmp_path: Path, config: Config, settings: dict[str, Any], text: str
) -> None:
    file = written(tmp_path / "m.gguf", **settings)
    with pytest.warns(UserWarning, match=f"no tokenizer: .*{text}"):
        assert load_tokenizer(file, config) is None


def test_a_file_without_a_name_for_its_cuts(tmp_path: Path, config: Config) -> None:
    file = written(tmp_path / "m.gguf", pre=None)
    with pytest.warns(UserWarning, match=r"does not say how.*tokenizer\.ggml\.pre.*default"):
        assert load_tokenizer(file, config).tokenize("1234") == ["12", "3", "4"]


def test_several_chat_templates(tmp_path: Path, config: Config) -> None:
    file = written(
        tmp_path / "m.gguf",
        **{
            "tokenizer.chat_template": "default {{ messages[0]['content'] }}",
            "tokenizer.chat_template.tool_use": "tools {{ messages[0]['content'] }}",
            "tokenizer.chat_templates": ["tool_use"],
        },
    )
    tokenizer = load_tokenizer(file, config)
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "default x"
    named = tokenizer.get_chat_template("tool_use")
    assert tokenizer.apply_chat_template(messages, chat_template=named, tokenize=False) == "tools x"


def test_a_damaged_conversion_is_made_anew(sample: Path, config: Config) -> None:
    expected = load_tokenizer(open_gguf(sample), config).encode("ab cd")
    (kept,) = (config.cache / "tokenizers").iterdir()
    (kept / "tokenizer.json").write_text("{")
    for _ in range(2):
        assert load_tokenizer(open_gguf(sample), config).encode("ab cd") == expected


def test_a_cache_that_cannot_be_written(sample: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = Config(cache=tmp_path / "file" / "cache", offline=True)
    with pytest.warns(UserWarning, match="the converted tokenizer is not kept"):
        tokenizer = load_tokenizer(open_gguf(sample), config)
    assert tokenizer.decode(tokenizer.encode("abcd")) == "abcd"


def test_a_token_twice(tmp_path: Path, config: Config) -> None:
    file = written(tmp_path / "m.gguf", tokens=["a", "b", "a"], token_type=[1, 1, 1])
    with pytest.warns(UserWarning, match="a token twice"):
        assert load_tokenizer(file, config) is None
