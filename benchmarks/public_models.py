"""What graphopt makes of transformers as people write them by hand: docs/public-models.md.

Each model of `tests/helpers/public_models` (one coding style a file, random weights) is compiled
with the cpu backend, compared with the module at two other sizes, and asked for a greedy
continuation, which is compared with the module's own loop.

    python benchmarks/public_models.py [--only NAME ...] [--doc docs/public-models.md]

With --only nothing is written unless --doc is given.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

from helpers import public_models  # noqa: E402
from helpers.public_measure import STEPS, TOLERANCE, measure  # noqa: E402

from graphopt.errors import GraphoptError  # noqa: E402

HEADER = ("model", "style", "captured", "attention", "largest relative error", "served")


def row(name: str) -> tuple[str, ...]:
    """The cells of one model; the first line of the refusal where one came."""
    style = public_models.style(name)
    try:
        outcome = measure(public_models.build(name))
    except GraphoptError as error:
        return name, style, f"no: {str(error).splitlines()[0]}", "", "", ""
    served = outcome.refusal
    if not served:
        is_equal = outcome.tokens == outcome.wanted
        served = f"yes, {STEPS} greedy tokens " + ("equal" if is_equal else "**not equal**")
        served += "".join(f"; {note}" for note in outcome.notes)
    wrong = "" if outcome.error < TOLERANCE else " **wrong**"
    return name, style, "yes", outcome.fused, f"{outcome.error:.1e}{wrong}", served


def document(rows: list[tuple[str, ...]], seconds: float) -> str:
    """docs/public-models.md."""
    lines = [
        "# Hand-written models",
        "",
        "Made by `python benchmarks/public_models.py`; do not edit. Each model is a file of "
        "`tests/helpers/public_models`, written for this table in a style in which people write "
        "transformers by hand: tiny, with random weights. It is compiled with the cpu backend and "
        f"compared with the module itself at two other sizes; *wrong* is a relative error above "
        f"{TOLERANCE:.0e} in float32. A model that is no causal language model, or that graphopt "
        "cannot give a KV cache, still runs as a program; the last column then has the first line "
        "of the refusal. A softmax that is no attention (a router's) counts as rejected. "
        "`tests/test_public_models.py` holds every row.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|---" * len(HEADER) + "|",
    ]
    lines += [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows
    ]
    captured = sum(cells[2] == "yes" for cells in rows)
    served = sum(cells[5].startswith("yes") for cells in rows)
    wrong = sum("**" in cells[4] or "**" in cells[5] for cells in rows)
    summary = f"{len(rows)} models: {captured} captured, {served} served, {wrong} wrong."
    made = f"Measured with torch {torch.__version__} in {seconds:.0f} s on one thread."
    return "\n".join([*lines, "", summary, "", made, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=public_models.names())
    parser.add_argument("--doc", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    start, rows = time.perf_counter(), []
    for name in options.only or public_models.names():
        rows.append(row(name))
        print(f"[{time.perf_counter() - start:4.0f} s] {' | '.join(rows[-1])}", flush=True)
    doc = options.doc or (None if options.only else ROOT / "docs" / "public-models.md")
    if doc:
        doc.write_text(document(rows, time.perf_counter() - start))


if __name__ == "__main__":
    main()
