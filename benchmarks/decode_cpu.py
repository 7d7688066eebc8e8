"""Prefill and decode on the CPU: graphopt against Hugging Face eager and llama.cpp, in one run.

Every peer is a process of its own that loads its model once and then obeys commands; the
measurements are interleaved (every peer does a workload, then every peer does it again), and
medians over the rounds are reported. Ratios are medians of the ratios within a round. Workloads:

    one    prefill of 1024 tokens, then 128 tokens
    eight  8 sequences, prefill of 128 tokens each (short, so that a round stays quick), then 128
           tokens in each

Tokens are chosen greedily, inside the time measured. Memory: the peak (VmHWM) of another fresh
process that loads and does `one`, and what it held (VmRSS) right after its imports. The KV caches
of graphopt and llama.cpp are fp16 and hold 2304 tokens; those with bf16 weights are bf16.

    python benchmarks/decode_cpu.py [--rounds 5] [--llama-python PYTHON] [--out results.json]

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
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

MODEL = "smollm2-135m"
PEERS = ("graphopt-4bit", "graphopt-bf16", "hf-bf16", "llama.cpp")
# workload: (sequences, tokens of each prompt, tokens decoded in each)
WORKLOADS = {"one": (1, 1024, 128), "eight": (8, 128, 128)}
CACHE_TOKENS = 2304
BLOCK = 16
PROFILE_STEPS = 40
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8")
FIGURES = ("prefill_tokens_per_s", "decode_tokens_per_s")
Prompts = Sequence[Sequence[int]]
# (prompts, tokens to decode) -> seconds of the prefill, of the decoding, tokens of each sequence
Measure = Callable[[Prompts, int], tuple[float, float, list[list[int]]]]
Profile = Callable[[Prompts], dict[str, Any]]


def prompts_of(workload: str) -> list[list[int]]:
    """The same pseudo-random prompts for every peer."""
    sequences, length, _ = WORKLOADS[workload]
    return [
        [(7919 * (i + 1 + 31 * s)) % 40000 + 1000 for i in range(length)] for s in range(sequences)
    ]


def memory(field: str) -> float:
    """VmRSS or VmHWM of this process, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return float(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"no {field} in /proc/self/status")


class TimedLibrary:
    """Stands in for the native library: times each call, or each instruction run on its own."""

    def __init__(self, library: Any, vocabulary: int) -> None:
        self.library, self.vocabulary = library, vocabulary
        self.split = False
        self.native = 0.0
        self.by_op: dict[str, float] = defaultdict(float)

    def run(self, instrs: Any, bases: Any, syms: Any, threads: int) -> None:
        """As `NativeLibrary.run`."""
        start = time.perf_counter()
        if self.split:
            self._run_one_by_one(instrs, bases, syms, threads)
        else:
            self.library.run(instrs, bases, syms, threads)
        self.native += time.perf_counter() - start

    def _run_one_by_one(self, instrs: Any, bases: Any, syms: Any, threads: int) -> None:
        import ctypes

        from graphopt.codegen.cpu.abi import Instr, Op

        for i in range(len(instrs)):
            single = (Instr * 1).from_buffer(instrs, i * ctypes.sizeof(Instr))
            name = Op(instrs[i].op).name.removeprefix("OP_").lower()
            if name == "linear" and instrs[i].dims[1].mult == self.vocabulary:
                name = "linear to the vocabulary"
            start = time.perf_counter()
            self.library.run(single, bases, syms, threads)
            self.by_op[name] += time.perf_counter() - start


def graphopt_peer(bits: str, threads: int) -> tuple[Measure, Profile]:
    """graphopt: packed weights with int8 activations, or bf16 weights and activations."""
    import torch

    import graphopt
    from graphopt.models import load

    if bits == "4bit":
        program = graphopt.compile(
            load(MODEL, weights="packed"), activations="int8", kv_dtype="float16", threads=threads
        )
    else:
        program = graphopt.compile(load(MODEL, dtype=torch.bfloat16), threads=threads)
    engine = program.engine(block_size=BLOCK, num_blocks=CACHE_TOKENS // BLOCK + 1)

    def start(prompts: Prompts, count: int) -> dict[int, list[int]]:
        """Submit, and step until every sequence has its first token."""
        params = graphopt.SamplingParams(max_tokens=count + 1, temperature=0.0, ignore_eos=True)
        tokens: dict[int, list[int]] = {engine.submit(prompt, params): [] for prompt in prompts}
        while not all(tokens.values()):
            step(tokens)
        return tokens

    def step(tokens: dict[int, list[int]]) -> None:
        for event in engine.step():
            assert event.token is not None
            tokens[event.request_id].append(event.token)

    def measure(prompts: Prompts, count: int) -> tuple[float, float, list[list[int]]]:
        begin = time.perf_counter()
        tokens = start(prompts, count)
        first = time.perf_counter()
        while engine.has_work:
            step(tokens)
        return first - begin, time.perf_counter() - first, list(tokens.values())

    def profile(prompts: Prompts) -> dict[str, Any]:
        """Milliseconds of a prefill and of a decode step, by kind of instruction."""
        executable: Any = program.executable
        timed = TimedLibrary(executable._library, executable.vocab_size)
        executable._library = timed
        timed.split = True
        tokens = start(prompts, 2 * PROFILE_STEPS)
        prefill = {name: 1e3 * seconds for name, seconds in timed.by_op.items()}
        rows: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        while engine.has_work:
            timed.split, timed.native = not timed.split, 0.0
            timed.by_op.clear()
            begin = time.perf_counter()
            step(tokens)
            whole = time.perf_counter() - begin
            row = {"step": whole, "native": timed.native, "python": whole - timed.native}
            rows[timed.split].append({**row, **timed.by_op})
        executable._library = timed.library
        whole_ms, split_ms = (_medians_ms(rows[split]) for split in (False, True))
        ops = {name: split_ms[name] for name in timed.by_op}
        return {
            "prefill_ms_by_op": _largest_first(prefill),
            "decode_step_ms": {name: whole_ms[name] for name in ("step", "native", "python")},
            "decode_ms_by_op": _largest_first(ops),
            "decode_ms_ops_one_by_one": sum(ops.values()),
            "instructions": sum(getattr(s, "count", 0) for s in executable.plan.segments),
            "barriers": executable.plan.barriers,
            "host_steps": executable.plan.host_steps,
        }

    return measure, profile


def _medians_ms(rows: list[dict[str, float]]) -> dict[str, float]:
    # The first and last steps may hold fewer sequences.
    kept = rows[2:-2]
    return {name: 1e3 * statistics.median(row[name] for row in kept) for name in kept[0]}


def _largest_first(times: dict[str, float]) -> dict[str, float]:
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def hf_peer() -> Measure:
    """Hugging Face eager attention, bf16, with its DynamicCache."""
    import torch
    from transformers import DynamicCache

    from graphopt.models import load

    model: Any = load(MODEL, dtype=torch.bfloat16).module
    model.set_attn_implementation("eager")

    @torch.inference_mode()
    def measure(prompts: Prompts, count: int) -> tuple[float, float, list[list[int]]]:
        begin = time.perf_counter()
        cache = DynamicCache(config=model.config)
        logits = model(torch.tensor(prompts), past_key_values=cache, logits_to_keep=1).logits
        columns = [logits[:, -1:].argmax(-1)]
        first = time.perf_counter()
        for _ in range(count):
            logits = model(columns[-1], past_key_values=cache).logits
            columns.append(logits[:, -1:].argmax(-1))
        return first - begin, time.perf_counter() - first, torch.cat(columns, 1).tolist()

    return measure


def llama_peer(path: str, threads: int) -> Measure:
    """llama.cpp on the same file, through the C interface that llama-cpp-python exposes."""
    import llama_cpp as c
    import numpy as np

    silent = c.llama_log_callback(lambda *_: None)
    c.llama_log_set(silent, None)
    c.llama_backend_init()
    model = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
    vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    contexts: dict[int, Any] = {}

    def context_for(sequences: int) -> Any:
        """A context each, so that one sequence does not pay for eight."""
        if sequences not in contexts:
            params = c.llama_context_default_params()
            params.n_ctx, params.n_batch, params.n_seq_max = CACHE_TOKENS, 1024, sequences
            params.n_threads = params.n_threads_batch = threads
            contexts[sequences] = c.llama_init_from_model(model, params)
        return contexts[sequences]

    def measure(prompts: Prompts, count: int) -> tuple[float, float, list[list[int]]]:
        context = context_for(len(prompts))
        batch = c.llama_batch_init(1024, 0, 1)

        def decode(rows: Prompts, position: int) -> list[int]:
            """The same number of tokens for every sequence; the greedy next token of each."""
            wanted, n = [], 0
            for sequence, tokens in enumerate(rows):
                for i, token in enumerate(tokens):
                    batch.token[n], batch.pos[n] = token, position + i
                    batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
                    batch.logits[n] = i == len(tokens) - 1
                    n += 1
                wanted.append(n - 1)
            batch.n_tokens = n
            if c.llama_decode(context, batch) != 0:
                raise RuntimeError("llama_decode failed")
            logits = (c.llama_get_logits_ith(context, i) for i in wanted)
            return [int(np.ctypeslib.as_array(row, (vocabulary,)).argmax()) for row in logits]

        c.llama_memory_clear(c.llama_get_memory(context), False)
        begin = time.perf_counter()
        steps = [decode(prompts, 0)]
        first = time.perf_counter()
        for i in range(count):
            steps.append(decode([[token] for token in steps[-1]], len(prompts[0]) + i))
        end = time.perf_counter()
        c.llama_batch_free(batch)
        return first - begin, end - first, [list(tokens) for tokens in zip(*steps, strict=True)]

    # The library calls the logger for as long as the model lives.
    measure.__dict__["logger"] = silent
    return measure


def worker(peer: str, gguf: str, threads: int) -> None:
    """Load, then answer commands: a workload's name, or `profile NAME`; one JSON line each."""
    if peer == "llama.cpp":
        import llama_cpp

        versions = {"llama-cpp-python": llama_cpp.__version__}
    else:
        import torch
        import transformers

        # Everything that the peers would import while they load.
        import graphopt.compiler
        import graphopt.models

        torch.set_num_threads(threads)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        versions["graphopt"] = graphopt.__version__
    imported = memory("VmRSS")
    begin = time.perf_counter()
    profile: Profile | None = None
    if peer == "llama.cpp":
        measure = llama_peer(gguf, threads)
    elif peer == "hf-bf16":
        measure = hf_peer()
    else:
        measure, profile = graphopt_peer(peer.removeprefix("graphopt-"), threads)
    print(json.dumps({"load_s": time.perf_counter() - begin, "versions": versions}), flush=True)
    for line in sys.stdin:
        *verb, workload = line.split()
        prompts, count = prompts_of(workload), WORKLOADS[workload][2]
        answer: dict[str, Any]
        if verb:
            assert profile is not None
            answer = profile(prompts)
        else:
            prefill, decode, tokens = measure(prompts, count)
            peak = memory("VmHWM")
            answer = {
                "prefill_tokens_per_s": sum(map(len, prompts)) / prefill,
                "decode_tokens_per_s": len(prompts) * count / decode,
                "first_tokens": [row[:8] for row in tokens],
                "memory_mb": {"imports": imported, "peak": peak, "added": peak - imported},
            }
        print(json.dumps(answer), flush=True)


class Worker:
    """A peer's process. Raises RuntimeError, with the last line it wrote, when it has died."""

    def __init__(self, peer: str, python: str, gguf: str, threads: int) -> None:
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        arguments = ["--worker", peer, "--gguf", gguf, "--threads", str(threads)]
        self._process = subprocess.Popen(
            [python, __file__, *arguments],
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


def run(rounds: int, llama_python: str, threads: int) -> dict[str, Any]:
    """Memory in fresh processes, then interleaved rounds, then where graphopt's time goes."""
    from graphopt.config import Config
    from graphopt.models.builtin import fetch_builtin

    gguf = str(fetch_builtin(MODEL, Config.from_environment()))
    report: dict[str, Any] = {"model": MODEL, "file": Path(gguf).name, "machine": machine()}
    report |= {"rounds": rounds, "threads": threads, "load_average": [os.getloadavg()[0]]}
    report |= {"skipped": {}, "versions": {}, "memory_mb": {}, "load_s": {}}
    workers: dict[str, Worker] = {}
    for peer in PEERS:
        python = llama_python if peer == "llama.cpp" else sys.executable
        try:
            fresh = Worker(peer, python, gguf, threads)
        except RuntimeError as error:
            report["skipped"][peer] = str(error)
            continue
        report["memory_mb"][peer] = fresh.ask("one")["memory_mb"]
        fresh.close()
        workers[peer] = Worker(peer, python, gguf, threads)
        report["load_s"][peer] = workers[peer].hello["load_s"]
        report["versions"] |= workers[peer].hello["versions"]
        print(f"{peer} is ready", file=sys.stderr)
    results: dict[str, Any] = {w: {p: [] for p in workers} for w in WORKLOADS}
    for number in range(rounds + 1):
        for workload, rows in results.items():
            for peer, process in workers.items():
                answer = process.ask(workload)
                del answer["memory_mb"]
                if number:  # the first round warms up
                    rows[peer].append(answer)
        print(f"round {number} of {rounds}", file=sys.stderr)
    report["profile"] = {
        f"{peer}, {workload}": workers[peer].ask(f"profile {workload}")
        for peer in workers
        if peer.startswith("graphopt")
        for workload in WORKLOADS
    }
    for process in workers.values():
        process.close()
    report["load_average"].append(os.getloadavg()[0])
    report["samples"] = results
    report["summary"] = {workload: summary(rows) for workload, rows in results.items()}
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
                    pairs = zip(values, rows[other], strict=True)
                    ratio = statistics.median(value / sample[figure] for value, sample in pairs)
                    entry[f"ratio to {other}"] = ratio
            result[peer][figure] = entry
    return result


def cells(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table."""
    titles = {"one": "1 x 1024", "eight": "8 x 128"}
    header = ["median tokens/s (to HF, to llama.cpp)"]
    header += [f"{kind}, {titles[w]}" for w in WORKLOADS for kind in ("prefill", "decode")]
    header += ["MB: imports", "peak", "added"]
    rows = []
    for peer, mb in report["memory_mb"].items():
        row = [peer]
        for workload in WORKLOADS:
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
        f"\nMedians of {report['rounds']} interleaved rounds; load average {load} (start, end).\n",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
        *(f"\nLeft out: {peer} ({why})" for peer, why in report["skipped"].items()),
    ]
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
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--gguf", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.gguf, arguments.threads)
        return
    from rich.console import Console
    from rich.table import Table

    report = run(arguments.rounds, arguments.llama_python, arguments.threads)
    # No path of the machine: results are published.
    other = "" if arguments.llama_python == sys.executable else " --llama-python PYTHON"
    options = f"--rounds {arguments.rounds} --threads {arguments.threads}{other}"
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
