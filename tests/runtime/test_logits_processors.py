"""Penalties and bans against transformers' own processors, and against its generate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

import graphopt
from graphopt.errors import BackendError, RequestError
from graphopt.program.program import Program
from graphopt.runtime import Engine, SamplingParams
from graphopt.runtime.logits_processors import History, process
from graphopt.runtime.sampler import SamplingRow, sample

VOCABULARY = 24
END = (3, 5)
# SamplingParams fields -> the same in transformers' names.
SETTINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
    ({"repetition_penalty": 0.6}, {"repetition_penalty": 0.6}),
    ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 1}),
    ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
    ({"no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": 3}),
    (
        {"bad_words_ids": ((7,), (1, 2), (9, 8, 4), (3,))},
        {"bad_words_ids": [[7], [1, 2], [9, 8, 4], [3]]},
    ),
    ({"min_tokens": 4}, {"min_new_tokens": 4}),
    ({"suppress_tokens": tuple(range(0, 24, 2))}, {"suppress_tokens": list(range(0, 24, 2))}),
    ({"begin_suppress_tokens": (1, 2, 3, 10)}, {"begin_suppress_tokens": [1, 2, 3, 10]}),
    (
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_tokens": 6},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 6},
    ),
]


def oracle(params: SamplingParams, tokens: list[int], prompt_length: int) -> LogitsProcessorList:
    """transformers' processors of these settings, in the order of its generate."""
    chain = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if params.no_repeat_ngram_size:
        chain.append(NoRepeatNGramLogitsProcessor(params.no_repeat_ngram_size))
    if params.bad_words_ids:
        words = [list(word) for word in params.bad_words_ids]
        chain.append(NoBadWordsLogitsProcessor(words, list(END)))
    if params.min_tokens:
        minimum = MinNewTokensLengthLogitsProcessor(prompt_length, params.min_tokens, list(END))
        chain.append(minimum)
    if params.suppress_tokens:
        chain.append(SuppressTokensLogitsProcessor(list(params.suppress_tokens)))
    if params.begin_suppress_tokens:
        begin = SuppressTokensAtBeginLogitsProcessor(
            list(params.begin_suppress_tokens), prompt_length
        )
        chain.append(begin)
    return chain


@pytest.mark.parametrize(("settings", "_"), SETTINGS)
def test_processed_logits_are_transformers(settings: dict[str, Any], _: Any) -> None:
    params = SamplingParams(max_tokens=50, **settings)
    rng = np.random.default_rng()
    for _round in range(60):
        tokens = rng.integers(0, rng.choice([4, VOCABULARY]), rng.integers(1, 14)).tolist()
        prompt_length = int(rng.integers(1, len(tokens) + 1))
        logits_V = torch.randn(VOCABULARY)
        chain = oracle(params, tokens, prompt_length)
        expected = chain(torch.tensor([tokens]), logits_V[None].clone())[0]
        before = logits_V.clone()
        got = process(logits_V, params, History(tokens, prompt_length, frozenset(END)))
        assert torch.equal(got, expected), (tokens, prompt_length)
        assert torch.equal(logits_V, before)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=list(END),
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def program(model: LlamaForCausalLM) -> Program:
    return graphopt.compile(model, backend="reference")


def reference(model: LlamaForCausalLM, prompt: list[int], **settings: Any) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=12,
        pad_token_id=0,
        **settings,
    )
    return tuple(out[0, len(prompt) :].tolist())


PROMPTS = [[7, 9, 7, 9, 8], [1], [2, 2, 2, 2, 2, 2, 2, 2]]


@pytest.mark.parametrize(("settings", "theirs"), SETTINGS)
def test_greedy_text_is_the_models_own(
    model: LlamaForCausalLM, program: Program, settings: dict[str, Any], theirs: dict[str, Any]
) -> None:
    done = program.generate(PROMPTS, max_tokens=12, **settings)
    for prompt, completion in zip(PROMPTS, done, strict=True):
        assert completion.tokens == reference(model, prompt, **theirs)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_neighbours_chunks_and_preemption_change_nothing(
    program: Program, temperature: float
) -> None:
    all_settings = [
        SamplingParams(max_tokens=14, temperature=temperature, seed=n, ignore_eos=True, **settings)
        for n, (settings, _) in enumerate(SETTINGS)
    ]
    prompts = [[n % 20 + 1, 7, 9, 7, 9] for n in range(len(all_settings))]
    alone = [
        program.engine().generate([prompt], params)[0].tokens
        for prompt, params in zip(prompts, all_settings, strict=True)
    ]
    tight: Engine = program.engine(block_size=2, num_blocks=25, max_tokens_per_step=6)
    together = [done.tokens for done in tight.generate(prompts, all_settings)]
    assert tight.stats.preemptions > 0
    assert together == alone
    assert len(set(alone)) > 1


def test_settings_that_rule_out_every_token(program: Program) -> None:
    everything = tuple(range(VOCABULARY))
    with pytest.raises(BackendError, match="after the request's own penalties and bans: requests"):
        program.generate([1, 2], max_tokens=2, suppress_tokens=everything)
    # The others go on.
    engine = program.engine()
    bad = engine.submit([1, 2], SamplingParams(max_tokens=2, suppress_tokens=everything))
    good = engine.submit([1, 2], SamplingParams(max_tokens=1))
    with pytest.raises(BackendError):
        engine.step()
    engine.cancel(bad)
    assert [event.request_id for event in engine.step()] == [good]


def test_ids_outside_the_vocabulary_are_named(program: Program) -> None:
    for name, value in (
        ("suppress_tokens", (1, 99)),
        ("begin_suppress_tokens", (99,)),
        ("bad_words_ids", ((1,), (2, 99))),
    ):
        with pytest.raises(RequestError, match=rf"{name} has token id 99; .* 0\.\.23"):
            program.generate([1], max_tokens=2, **{name: value})


def test_rows_without_settings_are_left_alone() -> None:
    logits_LV = torch.randn(3, 9)
    plain = SamplingRow(SamplingParams(), 0, 4)
    best = int(logits_LV[1].argmax())
    banned = SamplingRow(SamplingParams(suppress_tokens=(best,)), 0, 4, History([1], 1))
    got = sample(logits_LV, [plain, banned, plain])
    expected = logits_LV.argmax(-1).tolist()
    assert [got[0], got[2]] == [expected[0], expected[2]]
    assert got[1] == int(logits_LV[1].topk(2).indices[1])
