"""What rewrites assume of inputs is named, kept, told, and checked when a program is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.masked_models import HEADS, PADDINGS, VOCABULARY, WIDTH, Spelled, Spelling, padded
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import graphopt
from graphopt.errors import ProgramFormatError, RequestError, ScoreRangeError
from graphopt.ir.text.parser import parse_graph
from graphopt.ir.text.printer import print_graph


class Encoder(nn.Module):
    """Padding by arithmetic on the mask: `(1 - mask) * low`, or `mask * high + low`."""

    def __init__(self, low: float, causal: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HEADS * WIDTH)
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.attend = Spelled(Spelling("bits", low, causal))

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """`[B, S, H * D]`"""
        parts = self.qkv(self.embed(input_ids)).chunk(3, -1)
        q, k, v = (x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for x in parts)
        out: Tensor = self.attend(q, k, v, mask).transpose(1, 2).flatten(2)
        return out


class Inverted(Encoder):
    """One hides: `mask * low`, spelled with SDPA."""

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """`[B, S, H * D]`"""
        parts = self.qkv(self.embed(input_ids)).chunk(3, -1)
        q, k, v = (x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for x in parts)
        added = mask[:, None, None, :].to(q.dtype) * self.attend.spelling.low
        attend = nn.functional.scaled_dot_product_attention
        out: Tensor = attend(q, k, v, attn_mask=added).transpose(1, 2).flatten(2)
        return out


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: Encoder(torch.finfo(torch.float32).min, causal=False),
    "old-bert": lambda: Encoder(-1e4, causal=False),
    "gpt": lambda: Encoder(-1e9, causal=True),
    "bf16": lambda: Encoder(torch.finfo(torch.bfloat16).min, causal=True).to(torch.bfloat16),
    "inverted": lambda: Inverted(-1e9, causal=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_zeros_and_ones_are_checked(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for backend in ("reference", "cpu"):
        program = graphopt.compile(model, padded(2, 9, "right"), backend=backend)
        assert graphopt.explain(program, "fuse_attention").summary == "1 of 1 fused"
        assert [(a.code, a.subject) for a in program.graph.assumptions] == [
            ("zeros-and-ones", "mask")
        ]
        for where in PADDINGS:
            ids, mask = padded(3, 12, where)
            with torch.no_grad():
                expected = model(ids, mask)
            limit = 3e-2 if name == "bf16" else 1e-5
            assert (program(ids, mask) - expected).abs().max() <= limit
        for wrong in (2, -1, 7):
            ids, mask = padded(3, 12, "none")
            mask[1, 4] = wrong
            with pytest.raises(RequestError) as told:
                program(ids, mask)
            text = str(told.value)
            assert text.startswith(f"input 'mask' holds {wrong} at [1, 4]")
            assert "fuse_attention#0" in text
            assert "test_assumption_checks.py" in text or "masked_models.py" in text


def test_an_assumption_is_kept_and_told(tmp_path: Path) -> None:
    program = graphopt.compile(MODELS["bert"]().eval(), padded(2, 9, "right"), backend="reference")
    program.save(tmp_path / "saved")
    loaded = graphopt.load_program(tmp_path / "saved")
    assert loaded.graph.assumptions == program.graph.assumptions == program.graph.copy().assumptions
    ids, mask = padded(3, 12, "none")
    with pytest.raises(RequestError, match="input 'mask' holds 2"):
        loaded(ids, mask * 2)
    line = "assumes: mask holds zeros and ones (fuse_attention#0 at masked_models.py:"
    for subject in (program, loaded, program.graph, program.report):
        assert line in str(graphopt.explain(subject))
    told = graphopt.explain(program)
    assert type(told).from_dict(told.to_dict()) == told
    text = print_graph(program.graph)
    assert "\nassume zeros-and-ones %mask  # " in text
    assert print_graph(parse_graph(text, program.weights())) == text


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("assume good-weather %mask", "unknown assumption 'good-weather'"),
        ("assume zeros-and-ones %nothing", "cannot be made of 'nothing'"),
        ('assume zeros-and-ones "s"', "cannot be made of 's'"),
        ("assume hidden-weighs-nothing %mask", "cannot be made of 'mask'"),
    ],
)
def test_an_assumption_that_nobody_checks_is_not_read(line: str, reason: str) -> None:
    text = 'gir 1\ngraph "g" captured\ninput %mask : i64[batch, sequence] user\n'
    with pytest.raises(ProgramFormatError, match=reason):
        parse_graph(f"{text}{line}\n%0 : i64[batch, sequence] = aten.neg(%mask)\nreturn %0\n", {})


class Compared(nn.Module):
    """A mask that is compared says something for every integer."""

    def __init__(self, seen: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.seen, self.embed = seen, nn.Embedding(VOCABULARY, 8)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """`[B, S, 8]`"""
        q = self.embed(input_ids)
        hidden = ~self.seen(mask)[:, None, :]
        weights = (q @ q.mT).masked_fill(hidden, -1e9).softmax(-1)
        return weights @ q


@pytest.mark.parametrize(
    "seen",
    [lambda m: m == 0, lambda m: m > 0, lambda m: m != 0, lambda m: m.bool(), lambda m: m == 2],
    ids=["==0", ">0", "!=0", "bool", "==2"],
)
def test_a_comparison_assumes_nothing(seen: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Compared(seen).eval()
    program = graphopt.compile(model, padded(2, 9, "right"), backend="reference")
    assert graphopt.explain(program, "fuse_attention").summary == "1 of 1 fused"
    assert program.graph.assumptions == ()
    ids = torch.randint(0, VOCABULARY, (3, 12))
    mask = torch.randint(-1, 4, (3, 12))
    with torch.no_grad():
        expected = model(ids, mask)
    assert (program(ids, mask) - expected).abs().max() <= 1e-5


class Causal(nn.Module):
    """A causal model that hides by a number which large scores would reach."""

    def __init__(self, low: float, is_added: bool) -> None:
        super().__init__()
        self.low, self.is_added = low, is_added
        self.embed, self.qkv = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 48)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[B, S, V]`"""
        parts = self.qkv(self.embed(input_ids)).chunk(3, -1)
        q, k, v = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in parts)
        scores, n = q @ k.transpose(2, 3) * 0.3, input_ids.shape[1]
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        if self.is_added:
            scores = scores + torch.where(future, self.low, 0.0)
        else:
            scores = scores.masked_fill(future, self.low)
        out: Tensor = self.head((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize("is_added", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_scores_that_a_served_mask_does_not_hide_are_refused(is_added: bool, backend: str) -> None:
    torch.manual_seed(0)
    model, ids = Causal(-1e4, is_added).eval(), torch.randint(0, VOCABULARY, (3, 12))
    program = graphopt.compile(model, ids, backend=backend)
    assert program.serving is not None
    (assumed,) = program.serving.assumptions
    assert assumed.code == "hidden-weighs-nothing"
    assert str(assumed) in program.report.assumptions
    with torch.no_grad():
        assert (program(ids) - model(ids)).abs().max() <= 1e-5
        model.qkv.weight[:16] *= 1e5
    program = graphopt.compile(model, ids, backend=backend)
    with pytest.raises(ScoreRangeError, match=r"highest score lies outside.*serving='off'"):
        program.generate([1, 2, 3, 4, 5, 6], max_tokens=2)
    # A call computes the hidden keys, too, where they weigh something.
    exact = graphopt.compile(model, ids, backend=backend, serving="off")
    with torch.no_grad():
        expected = model(ids)
    for compiled in (program, exact):
        assert (compiled(ids) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_where_nothing_can_be_reached_nothing_is_assumed() -> None:
    ids = torch.randint(0, VOCABULARY, (2, 9))
    model = Causal(torch.finfo(torch.float32).min, is_added=True).eval()
    program = graphopt.compile(model, ids, backend="reference")
    assert program.serving is not None
    assert program.serving.assumptions == program.graph.assumptions == ()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_hugging_face_rows_that_see_nothing(family: str, implementation: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 64, "vocab_size": VOCABULARY}
    model: nn.Module
    if family == "bert":
        model = BertModel(BertConfig(**sizes, attn_implementation=implementation))
    else:
        config = LlamaConfig(**sizes, num_key_value_heads=2, attn_implementation=implementation)
        model = LlamaForCausalLM(config)
    model.eval()

    def some(batch: int, length: int, where: str) -> dict[str, Tensor]:
        ids, mask = padded(batch, length, where)
        return {"input_ids": ids, "attention_mask": mask}

    program = graphopt.compile(model, some(2, 9, "right"), backend="reference")
    for where in PADDINGS:
        inputs = some(3, 12, where)
        with torch.no_grad():
            expected = model(**inputs)[0]
        got = program(**inputs)
        got = got[0] if isinstance(got, tuple) else got
        assert (got - expected).abs().max() <= 1e-4, where
