"""A model after capture is the model before it: after success, refusal and interruption.

All families of `hf_families` are compared in the same way where `hf_roads` captures them.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from helpers.module_state import state_of, surroundings
from helpers.run_graph import assert_close, run
from helpers.tiny_models import tiny_llama
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from graphopt.capture import capture
from graphopt.errors import CaptureError

EXAMPLE = torch.arange(18).view(2, 9)
_TABLE: dict[int, Tensor] = {}


class Net(nn.Module):
    """Embeds, lets `keep` do what it wants with itself, projects."""

    shared: ClassVar[dict[str, Tensor]] = {}

    def __init__(self, keep: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 4)
        self.register_buffer("table", None, persistent=False)
        self.cache: dict[str, Any] = {"warm": [1, 2]}
        self.calls = 0
        self.keep = keep

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.keep(self, self.embed(ids)))
        return out


def angles(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[:, None] * 0.1


def registers_a_buffer(net: Net, x: Tensor) -> Tensor:
    if net.table is None:
        net.register_buffer("table", angles(x), persistent=False)
    return x + net.table


def sets_an_attribute(net: Net, x: Tensor) -> Tensor:
    net.angles = angles(x)
    return x + net.angles


def fills_a_dict(net: Net, x: Tensor) -> Tensor:
    net.cache["angles"] = angles(x)
    net.cache["warm"].append(net.cache["angles"])
    return x + net.cache["angles"]


def fills_a_class_attribute(net: Net, x: Tensor) -> Tensor:
    Net.shared["angles"] = angles(x)
    return x + Net.shared["angles"]


def fills_a_global(net: Net, x: Tensor) -> Tensor:
    _TABLE[0] = angles(x)
    return x + _TABLE[0]


@functools.lru_cache
def cached_angles(width: int) -> Tensor:
    return torch.arange(width) * 0.1


def calls_a_cached_function(net: Net, x: Tensor) -> Tensor:
    return x + cached_angles(x.shape[-1])


@dataclass(slots=True)
class Slotted:
    angles: Tensor | None = None


def fills_slots(net: Net, x: Tensor) -> Tensor:
    net.slotted.angles = angles(x)
    return x + net.slotted.angles


def counts(net: Net, x: Tensor) -> Tensor:
    net.calls += 1
    return x


def switches_modes(net: Net, x: Tensor) -> Tensor:
    net.head.train()
    net.head.weight.requires_grad_(not net.head.weight.requires_grad)
    torch.set_grad_enabled(False)
    return x


def adds_a_hook(net: Net, x: Tensor) -> Tensor:
    net.embed.register_forward_hook(lambda _m, _a, out: out)
    return x


def reads_random_states(net: Net, x: Tensor) -> Tensor:
    random.random()
    torch.manual_seed(random.randint(0, 9))
    return x


KEEPING = [
    registers_a_buffer,
    sets_an_attribute,
    fills_a_dict,
    fills_a_class_attribute,
    fills_a_global,
    calls_a_cached_function,
    fills_slots,
    switches_modes,
    adds_a_hook,
]


def net(keep: Callable[[Net, Tensor], Tensor]) -> Net:
    made = Net(keep).eval()
    made.slotted = Slotted()
    return made


def everything(model: nn.Module) -> tuple[Any, ...]:
    entries = cached_angles.cache_info().currsize
    return state_of(model), surroundings(), dict(Net.shared), dict(_TABLE), entries


@pytest.mark.parametrize("keep", KEEPING, ids=lambda keep: keep.__name__)
def test_what_forward_keeps_is_put_back(keep: Callable[[Net, Tensor], Tensor]) -> None:
    model = net(keep)
    cached_angles.cache_clear()
    before = everything(model)
    graph = capture(model, EXAMPLE)
    assert everything(model) == before
    other = torch.randint(0, 50, (3, 5))
    expected = model.head(model.keep(model, model.embed(other)))
    assert_close(run(graph, other), expected.detach())


def test_the_oracle_sees_what_a_run_leaves() -> None:
    for keep in (registers_a_buffer, sets_an_attribute, fills_a_dict, counts, adds_a_hook):
        model = net(keep)
        before = state_of(model)
        model(torch.randint(0, 50, (2, 9)))
        assert state_of(model) != before, keep.__name__
        model.eval()


def breaks(error: BaseException) -> Callable[[Net, Tensor], Tensor]:
    def keep(net: Net, x: Tensor) -> Tensor:
        registers_a_buffer(net, x)
        sets_an_attribute(net, x)
        fills_a_dict(net, x)
        fills_a_global(net, x)
        switches_modes(net, x)
        raise error

    return keep


def branches(net: Net, x: Tensor) -> Tensor:
    sets_an_attribute(net, x)
    return x if x.sum() > 0 else -x


def writes_a_buffer(net: Net, x: Tensor) -> Tensor:
    net.head.steps += 1
    return x + net.head.steps


def sets_a_buffer(net: Net, x: Tensor) -> Tensor:
    net.head.steps = net.head.steps + 1
    return x + net.head.steps


def writes_a_plain_tensor(net: Net, x: Tensor) -> Tensor:
    net.plain += 1
    return x + net.plain


def counts_and_adds(net: Net, x: Tensor) -> Tensor:
    net.calls += 1
    return x + net.calls


def remembers(net: Net, x: Tensor) -> Tensor:
    last = getattr(net, "last", None)
    net.last = x.mean((0, 1))
    return x if last is None else x + last


def writes_a_weight(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.head.weight.mul_(2)
    return x


def fixes_the_length(net: Net, x: Tensor) -> Tensor:
    sets_an_attribute(net, x)
    return x.reshape(x.shape[0], 9, 8)


FAILING: dict[str, tuple[Callable[[Net, Tensor], Tensor], type[BaseException], str]] = {
    "interrupted": (breaks(KeyboardInterrupt("stop")), KeyboardInterrupt, "stop"),
    "exits": (breaks(SystemExit(3)), CaptureError, "ends the process .*3"),
    "raises": (breaks(ValueError("no good")), CaptureError, "no good"),
    "out of memory": (breaks(MemoryError("full")), CaptureError, "full"),
    "branches": (branches, CaptureError, "could not capture|branch"),
    "writes a buffer": (writes_a_buffer, CaptureError, r"changes its state.*head\.steps"),
    "sets a buffer": (sets_a_buffer, CaptureError, r"its state: forward sets head\.steps, and"),
    "writes a plain tensor": (writes_a_plain_tensor, CaptureError, "changes its state.*plain"),
    "counts": (counts_and_adds, CaptureError, "changes its state: forward sets calls"),
    "draws at random": (reads_random_states, CaptureError, "random numbers from Python's random"),
    "counts for nothing": (counts, CaptureError, "forward sets calls, and goes on from it"),
    "remembers": (remembers, CaptureError, "changes its state: forward sets last"),
    "writes a weight": (writes_a_weight, CaptureError, r"changes its state.*head\.weight"),
    "fixes the length": (fixes_the_length, CaptureError, "(?s)could not capture|sequence"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_capture_that_fails_puts_everything_back(name: str) -> None:
    keep, error, message = FAILING[name]
    model = net(keep)
    model.head.register_buffer("steps", torch.zeros(8))
    model.plain = torch.zeros(8)
    before = everything(model)
    with pytest.raises(error, match=message):
        capture(model, EXAMPLE)
    assert everything(model) == before


def test_a_part_in_training_mode_is_named() -> None:
    model = net(counts)
    model.embed.train()
    before = everything(model)
    with pytest.raises(CaptureError, match=r"embed \(Embedding\) is in training mode"):
        capture(model, EXAMPLE)
    assert everything(model) == before


@pytest.mark.parametrize("example", [9, 30])
def test_longrope(example: int) -> None:
    # Its rotary embedding registers its frequencies anew in forward.
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [4.0, 8.0, 16.0, 30.0]}
    config = Phi3Config(
        vocab_size=80,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=128,
        original_max_position_embeddings=16,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": 16,
            **factors,
        },
    )
    model = Phi3ForCausalLM(config).eval()
    ids = torch.randint(1, 80, (2, example))
    before = state_of(model), surroundings()
    with pytest.raises(CaptureError):
        capture(model, ids)
    assert (state_of(model), surroundings()) == before


def test_interfaces_of_transformers_are_put_back() -> None:
    names = "get_interface", "__getitem__", "_global_mapping"
    kinds = AttentionInterface, AttentionMaskInterface

    def interfaces() -> list[Any]:
        held = [vars(kind).get(name) for kind in kinds for name in names]
        return [*held, dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)]

    before = interfaces()
    model = tiny_llama(layers=1)
    state = state_of(model)
    capture(model)
    with pytest.raises(CaptureError):
        capture(model, torch.rand(2, 9))
    assert interfaces() == before
    assert state_of(model) == state


STEP = 0


class Outside(nn.Module):
    """A model whose state lies beside its attributes. how: where."""

    number = 1

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.linear = how, nn.Linear(4, 4)
        step = 0

        def count() -> int:
            nonlocal step
            step += 1
            return step

        self.count = count
        self.places = itertools.count() if how == "iterator" else None
        self.last: Tensor | None = None
        self.calls = 0

    def forward(self, x: Tensor, kept: list[int] = []) -> Tensor:  # noqa: B006 (the fault itself)
        global STEP
        y = self.linear(x)
        if self.how == "global":
            STEP += 1
            return y * STEP
        if self.how == "class":
            Outside.number += 1
            return y * Outside.number
        if self.how == "closure":
            return y * self.count()
        if self.how == "default":
            kept.append(1)
            return y * len(kept)
        if self.how == "iterator" and self.places is not None:
            return y * next(self.places)
        if self.how == "every third call":
            self.calls += 1
            return y * 2 if self.calls % 3 == 0 else y
        if self.how == "the first call":
            self.last = y if self.last is None else self.last
            return y + self.last
        previous = y if self.last is None else self.last
        self.last = 0.5 * (y + previous)
        return self.last


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("global", r"\.STEP"),
        ("class", r"Outside\.number"),
        ("closure", r"step"),
        ("default", r"Outside\.forward"),
        ("iterator", r"holds an iterator \(places\)"),
        ("every third call", r"forward sets calls, and goes on from it"),
        ("the first call", r"forward sets last"),
        ("smoothing", r"forward sets last"),
    ],
)
def test_state_beside_the_attributes_is_refused_and_put_back(how: str, name: str) -> None:
    model, x = Outside(how).eval(), torch.randn(3, 4)
    before = STEP, Outside.number
    with pytest.raises(CaptureError, match=name):
        capture(model, x)
    assert (STEP, Outside.number) == before
    assert (model.last, model.calls) == (None, 0)
    if how == "closure":
        assert model.count() == 1
    if how == "default":
        assert Outside.forward.__defaults__ == ([],)
