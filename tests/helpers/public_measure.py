"""What graphopt makes of one of `helpers.public_models`, beside the module itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import graphopt
from graphopt.errors import GraphoptError
from graphopt.program.program import Program
from helpers.public_models.sample import Sample

TOLERANCE = 1e-5
"""Largest relative error in float32."""
PROMPT, STEPS = (3, 9, 4, 7), 8
"""Token ids that greedy decoding starts from, and how many it adds."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """fused: summary of fuse_attention. error: largest relative error at the sizes of `others`,
    over all outputs. tokens, wanted: greedy tokens of the program and of the module, () when it is
    not served. refusal: the first line of why not, else "". notes: of the report.
    """

    fused: str
    error: float
    tokens: tuple[int, ...]
    wanted: tuple[int, ...]
    refusal: str
    notes: tuple[str, ...]


def measure(sample: Sample) -> Outcome:
    """Compile with the cpu backend and compare. Raises GraphoptError when it cannot be captured."""
    program = graphopt.compile(sample.module, tuple(sample.example), dynamic=sample.dynamic)
    error = max(relative_error(program, sample.module, inputs) for inputs in sample.others)
    tokens: tuple[int, ...] = ()
    wanted: tuple[int, ...] = ()
    refusal = ""
    try:
        tokens = program.generate(PROMPT, max_tokens=STEPS, ignore_eos=True)[0].tokens
        wanted = greedy(sample.module, PROMPT, STEPS)
    except GraphoptError as reason:
        refusal = str(reason).splitlines()[0]
    fused = graphopt.explain(program, "fuse_attention").summary
    return Outcome(fused, error, tokens, wanted, refusal, tuple(program.report.notes))


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors of what a forward returned, in order; None is left out."""
    return [value for value in tree_flatten(outputs)[0] if value is not None]


def relative_error(program: Program, module: nn.Module, inputs: Sequence[Tensor]) -> float:
    """Largest difference over the largest magnitude, of the worst output."""
    with torch.no_grad():
        wanted = tensors_of(module(*inputs))
    got = tensors_of(program(*inputs))
    assert [t.shape for t in got] == [t.shape for t in wanted]
    assert all(bool(w.isfinite().all()) for w in wanted)
    return max(float((g - w).abs().max() / w.abs().max()) for g, w in zip(got, wanted, strict=True))


def greedy(module: nn.Module, prompt: Sequence[int], steps: int) -> tuple[int, ...]:
    """The module's own loop: all tokens again for each next one."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            logits = tensors_of(module(torch.tensor([ids])))[0]
            ids.append(int(logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])
