import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gguf_samples import TOKENS, randomize, tiny_llama
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from graphopt.config import Config
from graphopt.errors import ModelNotFoundError, UnsupportedError, WeightFormatError
from graphopt.models import end_token_ids, load


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(cache=tmp_path / "cache", offline=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    tiny_llama().save_pretrained(path)
    return path


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits(module: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(ids).logits


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_folder_gives_the_saved_model(
    tmp_path: Path, config: Config, shard: str, tied: bool
) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "m", max_shard_size=shard)
    sharded = (tmp_path / "m" / "model.safetensors.index.json").exists()
    assert sharded == (shard == "40KB")
    source = load(tmp_path / "m", config=config)
    ids = torch.randint(0, 64, (2, 7))
    assert torch.equal(logits(source.module, ids), logits(model, ids))
    assert not source.module.training
    assert (source.module.lm_head.weight is source.module.model.embed_tokens.weight) == tied
    assert source.name == "m"
    assert source.tokenizer is None
    assert not source.packed


def test_dtype(folder: Path, config: Config) -> None:
    source = load(folder, dtype=torch.bfloat16, config=config)
    assert {parameter.dtype for parameter in source.module.parameters()} == {torch.bfloat16}
    assert source.module.model.rotary_emb.inv_freq.dtype == torch.float32
    assert source.dtype == torch.bfloat16


def test_saved_architecture_decides_the_class(tmp_path: Path, config: Config) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    bert = randomize(BertModel(BertConfig(intermediate_size=64, **sizes)))
    bert.save_pretrained(tmp_path / "bert")
    module = load(tmp_path / "bert", config=config).module
    assert type(module) is BertModel
    gpt2 = randomize(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)))
    gpt2.save_pretrained(tmp_path / "gpt2")
    edit_config(tmp_path / "gpt2", architectures=None)
    ids = torch.randint(0, 50, (1, 5))
    got = logits(load(tmp_path / "gpt2", config=config).module, ids)
    assert torch.equal(got, logits(gpt2, ids))


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [(2, None, (2,)), (2, [7, 3], (3, 7)), (None, None, ())],
)
def test_end_tokens(
    folder: Path, config: Config, in_config: Any, in_generation: Any, expected: tuple[int, ...]
) -> None:
    edit_config(folder, eos_token_id=in_config)
    (folder / "generation_config.json").unlink()
    if in_generation is not None:
        text = json.dumps({"eos_token_id": in_generation})
        (folder / "generation_config.json").write_text(text)
    assert load(folder, config=config).eos_token_ids == expected


def test_tokenizer(folder: Path, config: Config) -> None:
    words = WordLevel({token: index for index, token in enumerate(TOKENS)}, unk_token="a")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)
    assert load(folder, config=config).tokenizer.encode("cd") == [TOKENS.index("cd")]


def test_pickled_weights_are_refused_unopened(folder: Path, config: Config) -> None:
    (folder / "model.safetensors").unlink()
    # Unpickling this would fail with another error than the refusal.
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    (folder / "more.pt").write_bytes(b"")
    text = r"no \*\.safetensors, only more\.pt, pytorch_model\.bin.*save_pretrained"
    with pytest.raises(WeightFormatError, match=text):
        load(folder, config=config)


def test_safetensors_win_over_pickled(folder: Path, config: Config) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert load(folder, config=config).module is not None


def rewrite(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model.norm.weight": None}, r"missing \['model\.norm\.weight'\]"),
        ({"model.extra": torch.zeros(2)}, r"unexpected \['model\.extra'\]"),
        ({"model.norm.weight": torch.zeros(3)}, r"(?s)model\.norm\.weight.*3"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    folder: Path, config: Config, changes: Any, text: str
) -> None:
    rewrite(folder, changes)
    with pytest.raises(WeightFormatError, match=text):
        load(folder, config=config)


def test_truncated_safetensors(folder: Path, config: Config) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightFormatError, match="could not be read"):
        load(folder, config=config)


def test_missing_shard(tmp_path: Path, config: Config) -> None:
    tiny_llama().save_pretrained(tmp_path / "m", max_shard_size="40KB")
    sorted((tmp_path / "m").glob("*.safetensors"))[1].unlink()
    with pytest.raises(WeightFormatError, match="could not be read"):
        load(tmp_path / "m", config=config)


def test_code_that_comes_with_a_model_is_not_run(folder: Path, config: Config) -> None:
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_config(folder, model_type="evil", auto_map=code, architectures=["Model"])
    (folder / "evil.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(UnsupportedError, match="never sets trust_remote_code"):
        load(folder, config=config)


def test_unknown_model_type(folder: Path, config: Config) -> None:
    edit_config(folder, model_type="no-such-model")
    with pytest.raises(UnsupportedError, match="no-such-model"):
        load(folder, config=config)


def test_damaged_config(folder: Path, config: Config) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightFormatError, match="not valid JSON"):
        load(folder, config=config)


def test_folder_without_config(tmp_path: Path, config: Config) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        load(tmp_path, config=config)
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"did you mean the file .*weights\.gguf"):
        load(tmp_path, config=config)


def test_packed_needs_gguf(folder: Path, config: Config) -> None:
    with pytest.raises(UnsupportedError, match="holds dense safetensors"):
        load(folder, weights="packed", config=config)


def test_hub_name_from_the_local_cache(
    folder: Path, tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    source = load("someone/tiny", config=config)
    assert source.name == "someone/tiny"
    assert sum(parameter.numel() for parameter in source.module.parameters()) > 0


def test_hub_name_offline_and_not_cached(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    text = r"tried: no local path 'someone/nothing'.*local cache only.*GRAPHOPT_OFFLINE"
    with pytest.raises(ModelNotFoundError, match=text):
        load("someone/nothing", config=config)


def test_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    # A port on which nothing listens: refused at once, whatever network the machine has.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    online = Config(cache=tmp_path, offline=False)
    with pytest.raises(ModelNotFoundError, match=r"tried: .*Hugging Face hub and its local cache"):
        load("someone/nothing", config=online)


def test_config_that_is_no_text(folder: Path, config: Config) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(WeightFormatError, match=r"config\.json is damaged.*not valid JSON"):
        load(folder, config=config)


def test_config_with_a_value_of_another_type(folder: Path, config: Config) -> None:
    edit_config(folder, num_attention_heads="4")
    with pytest.raises(
        UnsupportedError, match=r"cannot read the configuration.*num_attention_heads"
    ):
        load(folder, config=config)


@pytest.mark.parametrize("names", [[None], [3], "LlamaForCausalLM"])
def test_architectures_that_are_no_names(folder: Path, config: Config, names: Any) -> None:
    edit_config(folder, architectures=names)
    with pytest.raises((WeightFormatError, UnsupportedError), match="architectures"):
        load(folder, config=config)


@pytest.mark.parametrize("name", ["pipeline", "LLaMAForCausalLM", "PreTrainedTokenizerFast"])
def test_architectures_that_transformers_does_not_have(
    folder: Path, config: Config, name: str
) -> None:
    expected = load(folder, config=config).module
    edit_config(folder, architectures=[name])
    module = load(folder, config=config).module
    ids = torch.randint(0, 64, (2, 7))
    assert torch.equal(logits(module, ids), logits(expected, ids))


def test_model_that_cannot_be_built(folder: Path, config: Config) -> None:
    edit_config(folder, hidden_act="no-such-activation")
    with pytest.raises(WeightFormatError, match="no-such-activation"):
        load(folder, config=config)


def test_damaged_tokenizer(folder: Path, config: Config) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(WeightFormatError, match=r"tokenizer of .* could not be read.*token ids"):
        load(folder, config=config)


def test_end_tokens_of_other_modules() -> None:
    assert end_token_ids(torch.nn.Linear(2, 2)) == ()
