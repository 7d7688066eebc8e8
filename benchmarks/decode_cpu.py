"""Prefill and decode on the CPU: graphopt against Hugging Face eager and llama.cpp, in one run.

Every peer is a process of its own that loads its model once; the measurements are interleaved round
by round, and medians are reported. Prefill: 1024 tokens. Decode, batch 1: 128 tokens after them.
Decode, batch 8: 64 tokens in each of 8 sequences after prompts of 128 tokens. Memory: the peak of
the process minus what it held after its imports.

    python benchmarks/decode_cpu.py [--rounds 3] [--llama-python PYTHON] [--out results.json]

llama-cpp-python may live in another environment: name its interpreter with --llama-python.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m"
PREFILL, DECODE, BATCH, BATCH_PROMPT, BATCH_DECODE = 1024, 128, 8, 128, 64
PEERS = ("graphopt-4bit", "graphopt-bf16", "hf-bf16", "llama.cpp")
Measure = Callable[[], dict[str, float]]


def tokens(count: int, seed: int = 0) -> list[int]:
    """The same pseudo-random prompt for every peer."""
    return [(7919 * (i + 1 + 31 * seed)) % 40000 + 1000 for i in range(count)]


def memory(field: str) -> float:
    """VmRSS or VmHWM of this process, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) / 1e3
    raise RuntimeError(f"no {field} in /proc/self/status")


def graphopt_peer(bits: str, threads: int) -> tuple[float, Measure]:
    """graphopt: packed weights with int8 activations, or bf16 weights and activations."""
    import torch

    import graphopt
    from graphopt.models import load

    torch.set_num_threads(threads)
    before = memory("VmRSS")
    if bits == "4bit":
        source = load(MODEL, weights="packed")
        program = graphopt.compile(source, activations="int8", kv_dtype="float16")
    else:
        source = load(MODEL, dtype=torch.bfloat16)
        program = graphopt.compile(source)
    del source
    engine = program.engine()

    def decode(prompts: list[list[int]], count: int) -> tuple[float, float]:
        """(seconds until every sequence has its first token, seconds for the rest)."""
        params = graphopt.SamplingParams(max_tokens=count + 1, ignore_eos=True)
        start = time.perf_counter()
        waiting = {engine.submit(prompt, params) for prompt in prompts}
        while waiting:
            waiting -= {event.request_id for event in engine.step()}
        first = time.perf_counter()
        while engine.stats.running or engine.stats.waiting:
            engine.step()
        return first - start, time.perf_counter() - first

    def measure() -> dict[str, float]:
        prefill, one = decode([tokens(PREFILL)], DECODE)
        _, many = decode([tokens(BATCH_PROMPT, s) for s in range(BATCH)], BATCH_DECODE)
        return {"prefill_s": prefill, "decode_s": one, "batch_decode_s": many}

    return before, measure


def hf_peer(threads: int) -> tuple[float, Measure]:
    """Hugging Face eager attention, bf16, with its dynamic cache."""
    import torch

    from graphopt.models import load

    torch.set_num_threads(threads)
    before = memory("VmRSS")
    model: Any = load(MODEL, dtype=torch.bfloat16).module
    model.config._attn_implementation = "eager"

    def decode(prompts: list[list[int]], count: int) -> tuple[float, float]:
        with torch.inference_mode():
            start = time.perf_counter()
            out = model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            first = time.perf_counter()
            for _ in range(count):
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            return first - start, time.perf_counter() - first

    def measure() -> dict[str, float]:
        prefill, one = decode([tokens(PREFILL)], DECODE)
        _, many = decode([tokens(BATCH_PROMPT, s) for s in range(BATCH)], BATCH_DECODE)
        return {"prefill_s": prefill, "decode_s": one, "batch_decode_s": many}

    return before, measure


def llama_peer(path: str, threads: int) -> tuple[float, Measure]:
    """llama.cpp through llama-cpp-python; its high-level interface decodes one sequence."""
    import numpy as np
    from llama_cpp import Llama

    before = memory("VmRSS")
    model = Llama(
        path, n_ctx=2048, n_batch=1024, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def measure() -> dict[str, float]:
        model.reset()
        start = time.perf_counter()
        model.eval(tokens(PREFILL))
        first = time.perf_counter()
        for _ in range(DECODE):
            model.eval([int(np.argmax(model._scores[-1]))])
        return {"prefill_s": first - start, "decode_s": time.perf_counter() - first}

    return before, measure


def worker(peer: str, gguf: str, threads: int) -> None:
    """Load, then measure once a line of standard input."""
    if peer == "llama.cpp":
        before, measure = llama_peer(gguf, threads)
    elif peer == "hf-bf16":
        before, measure = hf_peer(threads)
    else:
        before, measure = graphopt_peer(peer.removeprefix("graphopt-"), threads)
    print("ready", flush=True)
    for _ in sys.stdin:
        result = measure()
        result["peak_mb"] = memory("VmHWM") - before
        print(json.dumps(result), flush=True)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch
    import transformers

    info = Path("/proc/cpuinfo").read_text()
    line = next((x for x in info.splitlines() if x.startswith("model name")), "")
    flags = next((x for x in info.splitlines() if x.startswith("flags")), "").split()
    return {
        "cpu": line.partition(":")[2].strip(),
        "cores": os.cpu_count(),
        "flags": [f for f in flags if f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16")],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def run(rounds: int, llama_python: str | None, threads: int) -> dict[str, Any]:
    """Start the peers, interleave their rounds, collect medians."""
    from graphopt.config import Config
    from graphopt.models.builtin import fetch_builtin

    gguf = str(fetch_builtin(MODEL, Config.from_environment()))
    processes: dict[str, subprocess.Popen[str]] = {}
    skipped: dict[str, str] = {}
    for peer in PEERS:
        python = llama_python or sys.executable if peer == "llama.cpp" else sys.executable
        command = [python, __file__, "--worker", peer, "--gguf", gguf, "--threads", str(threads)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            skipped[peer] = f"could not start (exit {process.wait()})"
            continue
        processes[peer] = process
    rows: dict[str, list[dict[str, float]]] = {peer: [] for peer in processes}
    for number in range(rounds + 1):
        for peer, process in processes.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            result = json.loads(process.stdout.readline())
            if number:  # the first round warms up
                rows[peer].append(result)
    for process in processes.values():
        process.communicate()
    medians = {
        peer: {key: statistics.median(r[key] for r in results) for key in results[0]}
        for peer, results in rows.items()
    }
    return {"machine": machine(), "rounds": rounds, "medians": medians, "skipped": skipped}


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table with rates and ratios."""
    medians = report["medians"]
    base_decode = medians.get("llama.cpp", {}).get("decode_s")
    base_prefill = medians.get("hf-bf16", {}).get("prefill_s")
    lines = [
        "| | prefill 1024, tokens/s | decode, tokens/s | decode x8, tokens/s | peak MB "
        "| prefill vs HF | decode vs llama.cpp |",
        "|---|---|---|---|---|---|---|",
    ]
    for peer, m in medians.items():
        many = f"{BATCH * BATCH_DECODE / m['batch_decode_s']:.0f}" if "batch_decode_s" in m else "-"
        prefill_ratio = f"{base_prefill / m['prefill_s']:.1f}x" if base_prefill else "-"
        decode_ratio = f"{base_decode / m['decode_s']:.2f}x" if base_decode else "-"
        lines.append(
            f"| {peer} | {PREFILL / m['prefill_s']:.0f} | {DECODE / m['decode_s']:.0f} | {many} "
            f"| {m['peak_mb']:.0f} | {prefill_ratio} | {decode_ratio} |"
        )
    lines += [f"\n{peer}: {why}" for peer, why in report["skipped"].items()]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--llama-python")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--gguf", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.gguf, arguments.threads)
        return
    report = run(arguments.rounds, arguments.llama_python, arguments.threads)
    report["command"] = " ".join(
        ["python", "benchmarks/decode_cpu.py", f"--rounds {arguments.rounds}"]
    )
    print(table(report))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
