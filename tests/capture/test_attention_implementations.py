"""Attention of a transformers model is graphopt's only where that computes the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.run_graph import assert_close, run
from helpers.tiny_models import tiny_llama
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel

from graphopt.capture import capture
from graphopt.capture.hf import attention_hooks
from graphopt.capture.hf_probe import difference_found
from graphopt.ir.graph import Graph, argument
from graphopt.ops import attention

EXAMPLE, FRESH = (2, 9), (3, 13)


def gated(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float = 1.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Sharper than the standard one, and half as large."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) * scaling * 2.0
    if attention_mask is None:
        # What the mask factory of SDPA leaves out is for the function to know.
        keys = torch.arange(key.shape[2])
        attention_mask = keys[None, :] <= keys[:, None]
    if attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous() * 0.5, None


@contextmanager
def registered(kind: type, name: str, function: Any) -> Iterator[None]:
    before = dict(kind._global_mapping)
    kind.register(name, function)
    try:
        yield
    finally:
        kind._global_mapping.clear()
        kind._global_mapping.update(before)


def check(model: LlamaForCausalLM, graph: Graph, **more: Any) -> None:
    ids = torch.randint(0, 101, FRESH)
    with torch.no_grad():
        assert_close(run(graph, ids), model(ids, use_cache=False, **more).logits, 1e-4)


def count(graph: Graph) -> int:
    return len(graph.calls(attention.SPEC.overload))


def is_kept(model: LlamaForCausalLM, graph: Graph, reason: str) -> None:
    """The model was captured as it runs, and the note says why."""
    assert count(graph) == 0
    (note,) = graph.notes
    assert note.startswith("attention is captured as the model computes it: ")
    assert reason in note
    check(model, graph)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_standard_functions_are_replaced(implementation: str) -> None:
    model = tiny_llama(attn_implementation=implementation)
    graph = capture(model, torch.randint(0, 101, EXAMPLE))
    assert count(graph) == 2
    assert graph.notes == ()
    check(model, graph)


def test_a_registered_function_is_kept() -> None:
    with (
        registered(AttentionInterface, "gated", gated),
        registered(AttentionMaskInterface, "gated", eager_mask),
    ):
        model = tiny_llama()
        model.set_attn_implementation("gated")
        graph = capture(model, torch.randint(0, 101, EXAMPLE))
        is_kept(model, graph, "model.layers.0.self_attn (LlamaAttention) uses the attention")
        assert "gated (test_attention_implementations.py:" in graph.notes[0]


def test_a_standard_name_with_another_function_is_kept() -> None:
    with registered(AttentionInterface, "sdpa", gated):
        model = tiny_llama(attn_implementation="sdpa")
        is_kept(model, capture(model, torch.randint(0, 101, EXAMPLE)), "function gated")


def test_a_standard_function_under_another_name_is_replaced() -> None:
    with (
        registered(AttentionInterface, "mine", sdpa_attention_forward),
        registered(AttentionMaskInterface, "mine", sdpa_mask),
    ):
        model = tiny_llama()
        model.set_attn_implementation("mine")
        graph = capture(model, torch.randint(0, 101, EXAMPLE))
        assert count(graph) == 2
        check(model, graph)


def test_another_eager_function_of_the_file_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", gated)
    model = tiny_llama(attn_implementation="eager")
    is_kept(model, capture(model, torch.randint(0, 101, EXAMPLE)), "function gated")


def own_mask(**options: Any) -> Tensor | None:
    """Every second key is hidden as well."""
    mask = eager_mask(**options)
    odd = torch.arange(mask.shape[-1]) % 2 == 1
    return mask.masked_fill(odd, torch.finfo(mask.dtype).min)


def test_a_mask_function_of_the_users_own_is_kept() -> None:
    with registered(AttentionMaskInterface, "eager", own_mask):
        model = tiny_llama(attn_implementation="eager")
        graph = capture(model, torch.randint(0, 101, EXAMPLE))
        is_kept(model, graph, "masks of attention 'eager' are made by own_mask")


class Passes(LlamaAttention):
    """Gives its attention function one argument more."""

    def forward(self, *args: Any, **options: Any) -> Any:
        return super().forward(*args, **options, temperature=torch.ones(()) * 2)


def with_layers(kind: type[nn.Module]) -> LlamaForCausalLM:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.__class__ = kind
    return model


def test_an_argument_that_is_not_known_is_named() -> None:
    model = with_layers(Passes)
    graph = capture(model, torch.randint(0, 101, EXAMPLE))
    is_kept(
        model, graph, "model.layers.0.self_attn (Passes) gives its attention function temperatu"
    )


def test_arguments_known_to_be_harmless() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 101, EXAMPLE)
    graph = capture(model, {"input_ids": ids, "output_router_logits": True, "max_length_q": 9})
    assert count(graph) == 2
    check(model, graph)


def positioned(make: Callable[[int, int], Tensor]) -> LlamaForCausalLM:
    """A Llama that makes its positions itself: `[batch, length]`."""

    class Positioned(LlamaModel):
        def forward(self, input_ids: Tensor, **options: Any) -> Any:
            options["position_ids"] = make(*input_ids.shape)
            return super().forward(input_ids, **options)

    model = tiny_llama(layers=1)
    model.model.__class__ = Positioned
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda b, s: torch.arange(s)[None] % 4,
        lambda b, s: torch.arange(2 * s)[None, ::2],
        lambda b, s: torch.arange(s).flip(0)[None],
        lambda b, s: torch.arange(s * b).view(s, b).t(),
        lambda b, s: torch.zeros(b, s, dtype=torch.int64),
    ],
)
def test_positions_that_are_no_iota_are_found(make: Callable[[int, int], Tensor]) -> None:
    model = positioned(make)
    is_kept(model, capture(model, torch.randint(0, 101, EXAMPLE)), "positions are made by")


@pytest.mark.parametrize(
    "make",
    [
        lambda b, s: (torch.arange(s) + 2).unsqueeze(0).repeat(b, 1),
        lambda b, s: torch.arange(64)[:s].expand(b, -1),
        lambda b, s: torch.arange(s).view(1, 1, -1).expand(3, b, -1)[1],
    ],
)
def test_positions_that_are_an_iota(make: Callable[[int, int], Tensor]) -> None:
    model = positioned(make)
    graph = capture(model, torch.randint(0, 101, EXAMPLE))
    assert (count(graph), graph.notes) == (1, ())
    assert all(argument(c, "pad_BT") is None for c in graph.calls(attention.SPEC.overload))
    check(model, graph)


def test_attention_that_is_causal_only_under_one_implementation() -> None:
    class Unmasked(LlamaAttention):
        def forward(self, hidden_states: Tensor, **options: Any) -> Any:
            options["attention_mask"] = None
            return super().forward(hidden_states, **options)

    for implementation in ("sdpa", "eager"):
        model = with_layers(Unmasked)
        model.set_attn_implementation(implementation)
        graph = capture(model, torch.randint(0, 101, EXAMPLE))
        check(model, graph)
        causal = [argument(call, "causal") for call in graph.calls(attention.SPEC.overload)]
        assert causal == ([True, True] if implementation == "sdpa" else [])


@pytest.mark.parametrize(
    "change",
    [
        lambda call: replace(call, scale=call.scale * 1.5),
        lambda call: replace(call, softcap=0.5),
        lambda call: replace(call, sinks=""),
        lambda call: replace(call, mask=None, causal=True),
        lambda call: replace(call, own=gated),
        lambda call: replace(call, groups=3),
        lambda call: replace(call, bias_heads=4),
    ],
)
def test_every_call_is_compared_with_the_layers_function(change: Callable[[Any], Any]) -> None:
    model = tiny_llama(layers=1, attn_implementation="eager")
    with attention_hooks(model, positions_given=False) as layers, torch.no_grad():
        model(torch.randint(0, 101, EXAMPLE), use_cache=False)
    (call,) = layers.calls
    assert difference_found([call]) is None
    found = difference_found([change(call)])
    assert found is not None
    assert found.startswith("model.layers.0.self_attn (LlamaAttention): its attention function")
