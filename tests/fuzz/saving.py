"""A program with what a model's files say about generation and text can be saved and read again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import graphopt
from graphopt.program.program import Program
from graphopt.runtime.request import sampling_from_plain

from .harness import WrongError


def check_saved(program: Program, source: Any, folder: Path) -> None:
    """program: any; its options and tokenizer become those of `source`, since compiling each takes
    longer than a case may."""
    sampling = sampling_from_plain(source.sampling)
    program.options = replace(
        program.options, eos_token_ids=source.eos_token_ids, default_sampling=sampling
    )
    program.tokenizer = source.tokenizer
    program.save(folder)
    again = graphopt.load_program(folder)
    if again.options != program.options:
        raise WrongError(f"options {program.options} come back as {again.options}")
