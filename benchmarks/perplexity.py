"""Perplexity of graphopt's programs against the dequantized bf16 model.

Non-overlapping windows over the first tokens of a text; every window predicts all its tokens but
the first. The reference is Hugging Face with the same weights dequantized to bf16.

    python benchmarks/perplexity.py TEXT [--tokens 20000] [--window 1024] [--out results.json]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import graphopt
from graphopt.models import load

MODEL = "smollm2-135m"


def perplexity(logits_of: Callable[[Tensor], Tensor], ids: list[int], window: int) -> float:
    """exp of the mean negative log-likelihood over all windows."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        chunk = torch.tensor([ids[start : start + window]])
        if chunk.shape[1] < 2:
            break
        with torch.inference_mode():
            logits = logits_of(chunk)[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, chunk[0, 1:], reduction="sum").item()
        count += chunk.shape[1] - 1
    return math.exp(total / count)


def run(text: str, tokens: int, window: int) -> dict[str, Any]:
    """Perplexity of each variant, and its difference to the reference in percent."""
    dense = load(MODEL, dtype=torch.bfloat16)
    ids = dense.tokenizer.encode(text)[:tokens]
    results = {"hf bf16 (reference)": perplexity(lambda x: dense.module(x).logits, ids, window)}
    print(results, flush=True)
    variants: dict[str, dict[str, Any]] = {
        "4-bit, float activations": {"activations": "float"},
        "4-bit, int8 activations, fp16 cache": {"activations": "int8", "kv_dtype": "float16"},
    }
    for name, options in variants.items():
        program = graphopt.compile(load(MODEL, weights="packed"), **options)
        results[name] = perplexity(lambda x, p=program: torch.as_tensor(p(x)), ids, window)  # type: ignore[misc]
        print(name, results[name], flush=True)
    base = results["hf bf16 (reference)"]
    return {
        "tokens": len(ids),
        "window": window,
        "perplexity": results,
        "percent": {name: 100.0 * (value / base - 1.0) for name, value in results.items()},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report = run(arguments.text.read_text(), arguments.tokens, arguments.window)
    for name, value in report["perplexity"].items():
        print(f"{name:40} {value:8.4f}  {report['percent'][name]:+.3f} %")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
