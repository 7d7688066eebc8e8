"""The mutants of `tests/soundness` through graphopt and through Inductor's own pattern passes.

graphopt: what the test sees (`tests/soundness/judge.py`). Inductor: torch.compile with AOTAutograd
and the joint-graph passes, where the serialized attention patterns are; the code generation behind
them is replaced by running the graph, so that only rewrites count, and each program is compiled for
itself at the first size. A program that its rewrites change is then compiled whole, generated code
included. Both are compared with the eager model on fresh inputs, in the same way.

    python benchmarks/soundness.py [--every N] [--out benchmarks/results/soundness.json]
                                   [--doc docs/soundness.md]

--every N takes each N-th program only; nothing is written then unless --out or --doc is given.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "soundness")]

from every_mutant import KINDS  # noqa: E402
from judge import FRESH, Verdict, batches, inputs, is_wrong, judge, model_of, seeded  # noqa: E402
from mutations import Mutant  # noqa: E402

BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"
Row = dict[str, Any]


class WithInput(nn.Module):
    """A model of one program, called with its own x."""

    def __init__(self, mutant: Mutant) -> None:
        super().__init__()
        self.part = model_of([mutant])

    def forward(self, x: Tensor, pad_BS: Tensor) -> Tensor:
        """Its only result."""
        result: Tensor = self.part(x, pad_BS)[0]
        return result


def rewritten(graph: torch.fx.GraphModule, given: Sequence[Tensor]) -> Callable[..., Any]:
    """A backend: Inductor up to its code generation."""
    from torch._inductor.compile_fx import compile_fx

    def keep_graph(inner: torch.fx.GraphModule, _inputs: Sequence[Any], **_: Any) -> Any:
        return inner.forward

    compiled: Callable[..., Any] = compile_fx(graph, list(given), inner_compile=keep_graph)
    return compiled


def inductor_row(mutant: Mutant) -> Row:
    """What Inductor does to one program. fused: attention patterns that fired; is_wrong: by its
    rewrites; is_wrong_compiled: by the generated code too, None where nothing fired."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    row: Row = {"name": mutant.name, "fused": 0, "is_wrong": False, "is_wrong_compiled": None}
    model = WithInput(mutant).eval()
    x, pad = inputs(1, FRESH[0], seed=1)
    try:
        error, wrong = difference(model, torch.compile(model, backend=rewritten), x, pad)
        row["fused"] = int(counters["inductor"]["fuse_attention"])
        row |= {"is_wrong": wrong, "error": error}
        if row["fused"] or wrong:
            torch._dynamo.reset()
            error, wrong = difference(model, torch.compile(model), x, pad)
            row |= {"is_wrong_compiled": wrong, "error_compiled": error}
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return row


def difference(
    model: WithInput, program: Callable[..., Tensor], x: Tensor, pad: Tensor
) -> tuple[float, bool]:
    """(relative error, whether it is more than rounding)."""
    (theirs,), (ours,) = (seeded(lambda *a, f=f: (f(*a),), x, pad) for f in (model, program))
    return is_wrong(model.part.parts[0], x[0], pad, ours, theirs)


def figures(verdicts: Sequence[Verdict], rows: Sequence[Row]) -> dict[str, int]:
    """Counts of one kind."""
    results = Counter(verdict.result for verdict in verdicts)
    return {
        "programs": len(verdicts),
        "graphopt wrong": sum(verdict.is_wrong for verdict in verdicts),
        "graphopt fused": results["fused"],
        "graphopt rejected with a reason": results["rejected"],
        "graphopt without a record": results["no record"],
        "inductor wrong": sum(row["is_wrong"] and bool(row["is_wrong_compiled"]) for row in rows),
        "inductor fused": sum(bool(row["fused"]) for row in rows),
        "inductor failed": sum("failed" in row for row in rows),
    }


def table(kinds: dict[str, dict[str, int]]) -> str:
    """Markdown, with a line of sums."""
    names = list(next(iter(kinds.values())))
    total = {name: sum(kind[name] for kind in kinds.values()) for name in names}
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for kind, counts in [*kinds.items(), ("all", total)]:
        lines.append(f"| {kind} | " + " | ".join(str(counts[name]) for name in names) + " |")
    return "\n".join(lines)


def machine() -> dict[str, str]:
    """Versions, the processor and its vector extensions."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(
        (part.strip() for part in line.split(":", 1)) for line in text.splitlines() if ":" in line
    )
    vectors = [f for f in ("avx2", "avx512f") if f in fields.get("flags", "").split()]
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": fields.get("model name", platform.machine()),
        "vector extensions": ", ".join(vectors) or "none",
    }


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--doc", type=Path)
    options = parser.parse_args()
    out, doc = options.out, options.doc
    if options.every == 1:
        out = out or ROOT / "benchmarks" / "results" / "soundness.json"
        doc = doc or ROOT / "docs" / "soundness.md"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kinds: dict[str, dict[str, int]] = {}
    found: dict[str, Any] = {
        "machine": machine(),
        "every": options.every,
        "kinds": kinds,
        "wrong": [],
    }
    for name, mutants in KINDS.items():
        chosen = mutants[:: options.every]
        verdicts = [verdict for batch in batches(chosen) for verdict in judge(batch)]
        rows = [inductor_row(mutant) for mutant in chosen]
        kinds[name] = figures(verdicts, rows)
        found["wrong"] += [row for row in rows if row["is_wrong_compiled"] or "failed" in row]
        print(name, kinds[name], flush=True)
    print(table(kinds))
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")
    if doc is not None:
        head, _, rest = doc.read_text().partition(BEGIN)
        about = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
        tail = rest.partition(END)[2]
        doc.write_text(f"{head}{BEGIN}\n{table(kinds)}\n\n{about}.\n\n{END}{tail}")


if __name__ == "__main__":
    main()
