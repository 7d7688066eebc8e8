"""Small transformers in the styles in which people write them by hand, one style a file.

Each file is written for these tests and has `build() -> Sample`: the module with random weights,
inputs of several sizes, and what graphopt should make of it. `names()` lists the files.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from helpers.public_models.sample import Sample

_NO_MODELS = ("__init__", "sample")


def names() -> list[str]:
    """The models by file name, sorted."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in _NO_MODELS)


def style(name: str) -> str:
    """The style of one file in words: the docstring of the file."""
    text = import_module(f"{__name__}.{name}").__doc__ or ""
    return " ".join(text.split()).rstrip(".")


def build(name: str) -> Sample:
    """The model of one file, always with the same weights."""
    sample: Sample = import_module(f"{__name__}.{name}").build()
    return sample
