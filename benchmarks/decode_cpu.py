"""Prefill and decode on the CPU: graphopt against Hugging Face eager and llama.cpp, in one run.

Every peer is a process of its own that loads its model once and then obeys commands; the
measurements are interleaved (every peer does a workload, then every peer does it again), and
medians over the rounds are reported. Ratios are medians of the ratios within a round. Hugging Face,
by far the slowest, takes part in the first `--hf-rounds` only. Workloads:

    one    prefill of 1024 tokens, then 128 tokens
    eight  8 sequences, prefill of 128 tokens each (short, so that a round stays quick), then 128
           tokens in each

Tokens are chosen greedily, inside the time measured. graphopt's programs are compiled and saved
by a process of their own, and the peers load them. Memory: the peak (VmHWM) of the peer's process
when it has loaded and done `one`, and what it held (VmRSS) right after its imports. The KV caches
of graphopt and llama.cpp are fp16 and hold 2304 tokens; those with bf16 weights are bf16.

    python benchmarks/decode_cpu.py [--rounds 5] [--hf-rounds 1] [--llama-python PYTHON]
                                    [--out results.json]

llama-cpp-python may live in another environment: name its interpreter with --llama-python. It is
left out, with a note, when it cannot be imported. With --out, a table is written beside the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from decode_peers import MODEL, PEERS, WORKLOADS
from rich.console import Console
from rich.table import Table

from graphopt.config import Config
from graphopt.models.builtin import fetch_builtin

PEER_PROGRAM = Path(__file__).with_name("decode_peers.py")
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8")
FIGURES = ("prefill_tokens_per_s", "decode_tokens_per_s")


class Worker:
    """A peer's process. Raises RuntimeError, with the last line it wrote, when it has died."""

    def __init__(self, peer: str, python: str, gguf: str, threads: int) -> None:
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        arguments = [peer, "--gguf", gguf, "--threads", str(threads)]
        self._process = subprocess.Popen(
            [python, str(PEER_PROGRAM), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.hello = self._answer()

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command, wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"exit {code}: {last}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    present = fields.get("flags", fields.get("Features", "")).split()
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "flags": {flag: flag in present for flag in FLAGS},
        "python": platform.python_version(),
    }


def run(rounds: int, hf_rounds: int, llama_python: str, threads: int) -> dict[str, Any]:
    """Interleaved rounds, then where graphopt's time goes."""
    gguf = str(fetch_builtin(MODEL, Config.from_environment()))
    report: dict[str, Any] = {"model": MODEL, "file": Path(gguf).name, "machine": machine()}
    report |= {"rounds": rounds, "hf_rounds": hf_rounds, "threads": threads}
    report |= {"load_average": [os.getloadavg()[0]]}
    report |= {"skipped": {}, "versions": {}, "memory_mb": {}}
    report |= {"compile": {}, "load_s": {}}
    workers: dict[str, Worker] = {}
    for peer in PEERS:
        python = llama_python if peer == "llama.cpp" else sys.executable
        try:
            workers[peer] = Worker(peer, python, gguf, threads)
        except RuntimeError as error:
            report["skipped"][peer] = str(error)
            continue
        report["load_s"][peer] = workers[peer].hello["load_s"]
        if "compile" in workers[peer].hello:
            report["compile"][peer] = workers[peer].hello["compile"]
        report["versions"] |= workers[peer].hello["versions"]
        workers[peer].ask("warm")
        print(f"{peer} is ready", file=sys.stderr)
    samples: dict[str, Any] = {w: {p: [] for p in workers} for w in WORKLOADS if w != "warm"}
    for number in range(rounds):
        for workload, rows in samples.items():
            for peer, process in workers.items():
                if peer == "hf-bf16" and number >= hf_rounds:
                    continue
                answer = process.ask(workload)
                # The peak of a process that has done `one` and nothing larger.
                report["memory_mb"].setdefault(peer, answer.pop("memory_mb"))
                answer.pop("memory_mb", None)
                rows[peer].append(answer)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    report["profile"] = {
        f"{peer}, {workload}": workers[peer].ask(f"profile {workload}")
        for peer in workers
        if peer.startswith("graphopt")
        for workload in samples
    }
    for process in workers.values():
        process.close()
    report["load_average"].append(os.getloadavg()[0])
    report["samples"] = samples
    report["summary"] = {workload: summary(rows) for workload, rows in samples.items()}
    return report


def summary(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """peer -> figure -> median, and its ratio to Hugging Face and to llama.cpp."""
    result: dict[str, Any] = {}
    for peer, samples in rows.items():
        result[peer] = {}
        for figure in FIGURES:
            values = [sample[figure] for sample in samples]
            entry = {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for other in ("hf-bf16", "llama.cpp"):
                if other in rows:
                    # Hugging Face may take part in the first rounds only.
                    pairs = zip(values, rows[other], strict=False)
                    ratio = statistics.median(value / sample[figure] for value, sample in pairs)
                    entry[f"ratio to {other}"] = ratio
            result[peer][figure] = entry
    return result


def cells(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table."""
    titles = {"one": "1 x 1024", "eight": "8 x 128"}
    header = ["median tokens/s (to HF, to llama.cpp)"]
    header += [f"{kind}, {titles[w]}" for w in titles for kind in ("prefill", "decode")]
    header += ["MB: imports", "peak", "added"]
    rows = []
    for peer, mb in report["memory_mb"].items():
        row = [peer]
        for workload in titles:
            for figure in FIGURES:
                entry = report["summary"][workload][peer][figure]
                ratios = [f"{value:.2f}" for key, value in entry.items() if "ratio" in key]
                row.append(f"{entry['median']:.0f} ({', '.join(ratios)})")
        rows.append([*row, *(f"{mb[key]:.0f}" for key in ("imports", "peak", "added"))])
    return header, rows


def markdown(report: dict[str, Any]) -> str:
    """The report as text with tables."""
    header, rows = cells(report)
    about = report["machine"]
    flags = ", ".join(flag for flag, present in about["flags"].items() if present)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    load = " and ".join(f"{value:.1f}" for value in report["load_average"])
    lines = [
        f"# Decode on the CPU, {report['model']} ({report['file']})",
        f"\n`{report['command']}`\n",
        f"{about['cpu']}, {about['cores']} cores, {flags}; {report['threads']} threads; {versions}."
        f"\nMedians of {report['rounds']} interleaved rounds, Hugging Face in "
        f"{report['hf_rounds']}; load average {load} (start, end).\n",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
        *(f"\nLeft out: {peer} ({why})" for peer, why in report["skipped"].items()),
    ]
    lines += [
        "\n## Compiling, saving and loading\n",
        "| | compile, s (capture, passes, lower) | memory added, MB | weights file, MB | load, s |",
        "|---|---|---|---|---|",
    ]
    for peer, made in report["compile"].items():
        seconds = made["seconds"]
        stages = ", ".join(f"{seconds[stage]:.1f}" for stage in ("capture", "passes", "lower"))
        lines.append(
            f"| {peer} | {seconds['all']:.1f} ({stages}) | {made['memory_added_mb']:.0f} "
            f"| {sum(made['files_mb'].values()):.0f} | {report['load_s'][peer]:.1f} |"
        )
    for name, p in report["profile"].items():
        step = p["decode_step_ms"]
        lines.append(
            f"\n## A decode step of {name}\n\n{step['step']:.2f} ms: {step['native']:.2f} native, "
            f"{step['python']:.2f} Python; {p['instructions']} instructions, {p['barriers']} "
            f"barriers, {len(p['host_steps'])} host steps. Instructions run one by one take "
            f"{p['decode_ms_ops_one_by_one']:.2f} ms:\n"
        )
        lines += ["| | decode step, ms | prefill, ms |", "|---|---|---|"]
        lines += [
            f"| {op} | {ms:.3f} | {p['prefill_ms_by_op'][op]:.1f} |"
            for op, ms in p["decode_ms_by_op"].items()
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--hf-rounds", type=int, default=1, help="the slowest peer takes part in the first ones"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    hf_rounds = min(arguments.rounds, arguments.hf_rounds)
    report = run(arguments.rounds, hf_rounds, arguments.llama_python, arguments.threads)
    # No path of the machine: results are published.
    other = "" if arguments.llama_python == sys.executable else " --llama-python PYTHON"
    options = (
        f"--rounds {arguments.rounds} --hf-rounds {hf_rounds} --threads {arguments.threads}{other}"
    )
    report["command"] = f"python benchmarks/decode_cpu.py {options}"
    header, rows = cells(report)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    for peer, why in report["skipped"].items():
        print(f"left out: {peer} ({why})")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(markdown(report))


if __name__ == "__main__":
    main()
