"""How many attentions of 30 Hugging Face architectures become graphopt.attention, by road.

Each family of `tests/helpers/hf_families.py` (a tiny random model) is captured by three roads, with
and without a padding mask, cleaned and fused by every pass of those two stages, and compared with
the eager model on fresh inputs of other sizes (`tests/helpers/hf_roads.py`). In the same process
Inductor's own attention pass is counted on the eager model: `torch.compile` with AOTAutograd and
the joint-graph patterns, the code generation after them replaced by running the graph. Inductor
sees static shapes, which is the easier case for it. Every family runs in a process of its own, on
one thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

from helpers.hf_families import BY_NAME, FAMILIES, Family  # noqa: E402
from helpers.hf_roads import (  # noqa: E402
    EXAMPLE,
    FRESH,
    ROADS,
    TOLERANCE,
    call_of,
    measure,
    offers,
)

INDUCTOR = "inductor"
MASKS = {"no mask": False, "mask": True}
Row = dict[str, Any]


def graphopt_row(family: Family, road: Any, masked: bool) -> Row:
    """One family on one road; `error` instead of figures where it stopped."""
    if road != "hook" and not offers(family.build(), road):
        return {"not_offered": True}
    try:
        outcome = measure(family, road, masked)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    reasons = Counter((reason.code, reason.text) for reason in outcome.rejections)
    return {
        "present": outcome.present,
        "fused": outcome.fused,
        "dense": outcome.dense,
        "proven": outcome.proven,
        "softmaxes_left": outcome.softmaxes_left,
        "sdpa_left": outcome.sdpa_left,
        "error_vs_eager": outcome.error,
        "wrong": outcome.wrong,
        "rejected": [[code, text, count] for (code, text), count in sorted(reasons.items())],
    }


def inductor_row(family: Family, masked: bool) -> Row:
    """How many attentions Inductor's patterns fuse in the eager model, sizes fixed."""
    from torch._dynamo.utils import counters
    from torch._inductor.compile_fx import compile_fx

    def keep_graph(graph: torch.fx.GraphModule, _inputs: Sequence[Any], **_: Any) -> Any:
        return graph.forward

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = compile_fx(graph, inputs, inner_compile=keep_graph)
        return compiled

    model = family.build()
    model.set_attn_implementation("eager")
    counters.clear()
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            call = call_of(model, family.inputs(*EXAMPLE, masked))
            torch.compile(model, backend=backend, dynamic=False)(**call)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    return {"fused": counters["inductor"]["fuse_attention"]}


def work(name: str, roads: Sequence[str]) -> None:
    """Body of a process: all rows of one family, as a line of JSON."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    transformers.logging.set_verbosity_error()
    family = BY_NAME[name]
    rows = {
        road: {
            label: inductor_row(family, masked)
            if road == INDUCTOR
            else graphopt_row(family, road, masked)
            for label, masked in MASKS.items()
        }
        for road in roads
    }
    sys.stdout.write(json.dumps(rows) + "\n")


def run_worker(name: str, roads: Sequence[str], timeout: float) -> dict[str, Any]:
    """The rows of one process; a process that dies or takes too long is an error in every cell."""
    command = [sys.executable, __file__, "--worker", name, *roads]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        if done.returncode == 0:
            rows: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
            return rows
        error = (done.stderr.strip().splitlines() or ["no output"])[-1]
    except subprocess.TimeoutExpired:
        error = f"took longer than {timeout:.0f} s"
    return {road: {label: {"error": error} for label in MASKS} for road in roads}


def cell(row: Row, present: int) -> str:
    """What the table shows of one row."""
    if "not_offered" in row:
        return "not offered"
    if "error" in row:
        return "error"
    text = f"{row['fused']}/{present}"
    if row.get("dense"):
        text += f", {row['dense']} dense"
    if row["fused"] < present and "rejected" in row:
        text += "; " + ", ".join(f"`{code}` x{count}" for code, _text, count in row["rejected"])
    if row.get("wrong"):
        text += f"; **wrong** ({row['error_vs_eager']:.0e})"
    return text


def total(rows: Iterable[tuple[Row, int]]) -> str:
    """Sum of a column. Errors count as not fused; families HF does not offer do not count."""
    fused = present = dense = wrong = 0
    for row, attentions in rows:
        if "not_offered" not in row:
            present += attentions
            fused += row.get("fused", 0)
            dense += row.get("dense", 0)
            wrong += bool(row.get("wrong"))
    share = f"{fused}/{present} = {100 * fused / max(present, 1):.1f} %"
    return f"**{share}**, {dense} dense, {wrong} wrong" if dense or wrong else f"**{share}**"


def document(result: dict[str, Any]) -> str:
    """docs/coverage.md."""
    families: dict[str, Any] = result["families"]
    columns = [(road, label) for road in (*ROADS, INDUCTOR) for label in MASKS]
    columns = [c for c in columns if all(c[0] in entry for entry in families.values())]
    lines = [
        "# Attention coverage",
        "",
        "Made by `python benchmarks/coverage.py`; do not edit. Each family is a tiny random model "
        "(2 layers, windows of 4 or 5), captured with dynamic batch and length by three roads:",
        "",
        "- **hook**: `graphopt.capture(model)`; transformers calls graphopt's attention.",
        "- **sdpa**, **eager**: `torch.export` of the model with transformers' own attention, "
        "without graphopt; then `graphopt.capture(exported_program)`.",
        "- **inductor**: `torch.compile` of the eager model, static shapes; counted by Inductor's "
        "own `fuse_attention` counter in the same run.",
        "",
        "A cell says *fused / present*; *dense*: fused, but a dense mask or bias operand is kept; "
        "codes stand for candidates that were turned down. Each graph was run on fresh inputs of "
        f"another size ({FRESH[0]} x {FRESH[1]}, exported at {EXAMPLE[0]} x {EXAMPLE[1]}) and "
        f"compared with the eager model at positions that are no padding; *wrong* is a relative "
        f"error above {TOLERANCE:.0e} in float32. *mask*: 2-D padding masks, rows in turn full, "
        "padded right and padded left. Totals count an error as not fused and leave out what "
        "transformers does not offer.",
        "",
        "| family | " + " | ".join(f"{road}, {label}" for road, label in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name, entry in families.items():
        cells = [cell(entry[road][label], entry["attentions"]) for road, label in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    sums = [
        total((entry[road][label], entry["attentions"]) for entry in families.values())
        for road, label in columns
    ]
    lines += ["| **all** | " + " | ".join(sums) + " |", "", *_largest_error(families)]
    lines += _reasons(families) + _errors(families)
    environment = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    return "\n".join([*lines, f"Measured with {environment}, in {result['seconds']:.0f} s.", ""])


def _graphopt_rows(families: dict[str, Any]) -> Iterable[tuple[str, str, str, Row]]:
    for name, entry in families.items():
        for road in ROADS:
            for label in MASKS:
                yield name, road, label, entry[road][label]


def _largest_error(families: dict[str, Any]) -> list[str]:
    errors = [
        (row["error_vs_eager"], f"{name}, {road}, {label}")
        for name, road, label, row in _graphopt_rows(families)
        if "error_vs_eager" in row
    ]
    if not errors:
        return []
    error, where = max(errors)
    return [f"Largest error of the {len(errors)} graphs: {error:.1e} ({where}).", ""]


def _reasons(families: dict[str, Any]) -> list[str]:
    """Candidates turned down, by code; a router's softmax belongs here and is no miss."""
    counts: Counter[tuple[str, str, str]] = Counter()
    where: dict[tuple[str, str, str], set[str]] = {}
    for name, road, _label, row in _graphopt_rows(families):
        for code, text, count in row.get("rejected", []):
            counts[road, code, text] += count
            where.setdefault((road, code, text), set()).add(name)
    if not counts:
        return []
    lines = ["## Candidates turned down", "", "| road | code | reason | times | families |"]
    lines.append("|---|---|---|---|---|")
    for key, count in sorted(counts.items()):
        lines.append(f"| {' | '.join(key)} | {count} | {', '.join(sorted(where[key]))} |")
    return [*lines, ""]


def _errors(families: dict[str, Any]) -> list[str]:
    found = [
        f"- {name}, {road}, {label}: {entry[road][label]['error']}"
        for name, entry in families.items()
        for road in (*ROADS, INDUCTOR)
        if road in entry
        for label in MASKS
        if "error" in entry[road][label]
    ]
    return ["## Errors", "", *found, ""] if found else []


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(BY_NAME))
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a family")
    parser.add_argument("--no-inductor", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--doc", type=Path)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker[0], options.worker[1:])
        return
    names = options.only or [family.name for family in FAMILIES]
    roads = ROADS if options.no_inductor else (*ROADS, INDUCTOR)
    families: dict[str, Any] = {name: {"attentions": BY_NAME[name].attentions} for name in names}
    start = time.perf_counter()

    def one(name: str) -> None:
        rows = run_worker(name, roads, options.timeout)
        families[name].update(rows)
        shown = [
            f"{road}/{label}: {cell(row, families[name]['attentions'])}"
            for road, by_mask in rows.items()
            for label, row in by_mask.items()
        ]
        print(f"[{time.perf_counter() - start:4.0f} s] {name}: {' | '.join(shown)}", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, names))
    result = {
        "environment": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "Python": platform.python_version(),
        },
        "seconds": round(time.perf_counter() - start, 1),
        "families": families,
    }
    out, doc = options.out, options.doc
    if not options.only:
        out = out or ROOT / "benchmarks" / "results" / "coverage.json"
        doc = doc or ROOT / "docs" / "coverage.md"
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
    if doc:
        doc.write_text(document(result))


if __name__ == "__main__":
    main()
