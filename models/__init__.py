"""Models to start from: `load(ref)` for real weights, and plain modules written here.

`llama_like`, `gpt2_like` and `bert_like` are small nn.Modules with hand-written eager attention:
what a user's own model looks like to the compiler. They are imported by their own names.
"""

from graphopt.models.builtin import BUILTINS, DEFAULT_MODEL
from graphopt.models.hf.generation_config import (
    GenerationDefaults,
    end_token_ids,
    generation_defaults,
)
from graphopt.models.load import load

__all__ = [
    "BUILTINS",
    "DEFAULT_MODEL",
    "GenerationDefaults",
    "end_token_ids",
    "generation_defaults",
    "load",
]
