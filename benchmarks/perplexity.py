"""Perplexity of graphopt's programs against the model dequantized to bf16.

Text: the first `--tokens` tokens of a file, cut into non-overlapping windows of `--window` tokens.
Each window is computed on its own (no context from the window before) and predicts all its tokens
but the first; perplexity is exp of the mean over all predicted tokens.

The reference is Hugging Face's model, eager attention, with the same weights dequantized and
rounded to bf16, computed in bf16. A CPU without bf16 instructions does some thirty tokens a second
of that; `--reference fp32` computes the same bf16 weights in fp32.

    python benchmarks/perplexity.py TEXT [--tokens 20000] [--window 1024] [--out results.json]

With --out, a table is written beside the JSON as Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

import graphopt
from graphopt.models import load

MODEL = "smollm2-135m"
ACCEPTED_PERCENT = 1.0
Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Score:
    """Perplexity over `predicted` tokens."""

    perplexity: float
    predicted: int


def score(logits_of: Logits, ids: list[int], window: int) -> Score:
    """See the module docstring; log-likelihoods in float32, their sum in double."""
    total, count = 0.0, 0
    for first in range(0, len(ids) - 1, window):
        chunk_1S = torch.tensor([ids[first : first + window]])
        with torch.inference_mode():
            logits_SV = logits_of(chunk_1S)[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits_SV, chunk_1S[0, 1:], reduction="sum")
        total += loss.item()
        count += chunk_1S.shape[1] - 1
    return Score(math.exp(total / count), count)


def eager(arithmetic: torch.dtype) -> Logits:
    """The reference: weights rounded to bf16, then computed in `arithmetic`."""
    module: Any = load(MODEL, dtype=torch.bfloat16).module.to(arithmetic)
    module.set_attn_implementation("eager")

    def logits(ids_1S: Tensor) -> Tensor:
        result: Tensor = module(ids_1S, use_cache=False).logits
        return result

    return logits


def compiled(weights: Any, **options: Any) -> Logits:
    """graphopt's program of the model."""
    program = graphopt.compile(load(MODEL, weights=weights), **options)
    return lambda ids_1S: torch.as_tensor(program(ids_1S))


def variants(reference: str) -> dict[str, Callable[[], Logits]]:
    """Name -> how to make it; the reference first."""
    arithmetic = {"fp32": torch.float32, "bf16": torch.bfloat16}[reference]
    return {
        f"Hugging Face eager, bf16 weights, {reference} arithmetic (reference)": lambda: eager(
            arithmetic
        ),
        "graphopt 4-bit, int8 activations, fp16 cache": lambda: compiled(
            "packed", activations="int8", kv_dtype="float16"
        ),
        "graphopt 4-bit, float activations": lambda: compiled("packed"),
        "graphopt fp32 (dequantized)": lambda: compiled("dense"),
    }


def run(text: str, tokens: int, window: int, reference: str) -> dict[str, Any]:
    """Perplexity of every variant, and its difference to the reference in percent."""
    ids = load(MODEL, weights="packed").tokenizer.encode(text)[:tokens]
    results: dict[str, dict[str, Any]] = {}
    base = 0.0
    for name, make in variants(reference).items():
        result = score(make(), ids, window)
        base = base or result.perplexity
        percent = 100.0 * (result.perplexity / base - 1.0)
        results[name] = {
            "perplexity": result.perplexity,
            "percent": percent,
            "accepted": abs(percent) <= ACCEPTED_PERCENT,
            "predicted": result.predicted,
        }
        print(f"{name}: {result.perplexity:.4f} {percent:+.3f} %", flush=True)
    return {
        "model": MODEL,
        "tokens": len(ids),
        "window": window,
        "windows": "non-overlapping",
        "reference_arithmetic": reference,
        "accepted_percent": ACCEPTED_PERCENT,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "results": results,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as text with a table."""
    lines = [
        f"# Perplexity, {report['model']}",
        "",
        f"{report['tokens']} tokens, non-overlapping windows of {report['window']}; accepted: "
        f"within {report['accepted_percent']:g} % of the reference.",
        "",
        "| | perplexity | difference | accepted |",
        "|---|---|---|---|",
    ]
    for name, r in report["results"].items():
        verdict = "yes" if r["accepted"] else "no"
        lines.append(f"| {name} | {r['perplexity']:.4f} | {r['percent']:+.3f} % | {verdict} |")
    return "\n".join(lines) + "\n"


def show(report: dict[str, Any]) -> None:
    """The same on the terminal."""
    table = Table("", "perplexity", "difference")
    for name, r in report["results"].items():
        colour = "green" if r["accepted"] else "red"
        difference = f"[{colour}]{r['percent']:+.3f} %[/]"
        table.add_row(name, f"{r['perplexity']:.4f}", difference)
    Console().print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("text", type=Path, help="a text file, e.g. the test split of WikiText-2")
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--reference", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report = run(
        arguments.text.read_text(), arguments.tokens, arguments.window, arguments.reference
    )
    # The name of the text, not where it lies: results are published.
    report["text"] = arguments.text.name
    show(report)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(markdown(report))


if __name__ == "__main__":
    main()
