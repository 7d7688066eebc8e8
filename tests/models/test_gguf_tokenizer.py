from pathlib import Path

import pytest
from gguf_samples import CHAT_TEMPLATE, tiny_llama, write_gguf

import graphopt.models.gguf_tokenizer as subject
from graphopt.config import Config
from graphopt.models.gguf_file import open_gguf
from graphopt.models.gguf_tokenizer import load_tokenizer


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


def test_unconvertible_tokenizer_warns(sample: Path, config: Config) -> None:
    sample.write_bytes(
        sample.read_bytes().replace(b"tokenizer.ggml.merges", b"tokenizer.ggml.MERGES")
    )
    with pytest.warns(UserWarning, match="no tokenizer: transformers could not convert"):
        assert load_tokenizer(open_gguf(sample), config) is None
    assert not (config.cache / "tokenizers").exists()
