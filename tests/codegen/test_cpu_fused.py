"""Fused norms, rotations and gates of whole models run natively and give the model's logits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from helpers.serving_steps import Steps
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import graphopt
from graphopt.codegen.cpu.executable import CpuServing

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 101,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


def tiny(family: str, **settings: Any) -> Any:
    torch.manual_seed(random.randrange(1 << 30))
    config = CONFIG_MAPPING[family](**{**SIZES, **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize(
    ("family", "norms", "gates"),
    [
        ("glm", "graphopt.rms_norm", 2),
        ("cohere2", "graphopt.layer_norm", 2),
        ("ernie4_5", "graphopt.rms_norm", 2),
        ("phi3", "graphopt.rms_norm", 2),
        ("olmo", "graphopt.layer_norm", 2),
        ("gpt_neox", "graphopt.layer_norm", 0),
        ("persimmon", "graphopt.layer_norm", 0),
    ],
)
def test_nothing_runs_on_the_host(family: str, norms: str, gates: int) -> None:
    model = tiny(family)
    program = graphopt.compile(model, serving="required")
    executable = program.executable
    assert isinstance(executable, CpuServing)
    assert executable.plan.host_steps == []
    ops = executable.graph.op_counts()
    assert (ops["graphopt.rope"], ops["graphopt.swiglu"]) == (4, gates)
    assert ops[norms] > 0
    prompts = [[random.randrange(3, 101) for _ in range(n)] for n in (9, 1, 14)]
    for prompt, rows in zip(prompts, Steps(executable, prompts).run_in_chunks(4), strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)
