"""One peer of `decode_cpu.py`: a process that loads its model once and then obeys commands.

Each line of standard input is a workload's name (`warm`, `one`, `eight`) or, for graphopt,
`profile NAME`; each answer is one line of JSON. The first line of output is written when the model
is loaded. graphopt compiles in a process before that, saves the program, and loads it here. The top
of this file imports the standard library only: llama.cpp's process may have nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m"
PEERS = ("graphopt-4bit", "graphopt-bf16", "hf-bf16", "llama.cpp")
# workload: (sequences, tokens of each prompt, tokens decoded in each)
WORKLOADS = {"warm": (1, 16, 4), "one": (1, 1024, 128), "eight": (8, 128, 128)}
CACHE_TOKENS = 2304
BLOCK = 16
PROFILE_STEPS = 40
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


def compile_and_save(bits: str, folder: Path, threads: int) -> dict[str, Any]:
    """Packed weights with int8 activations, or bf16 weights and activations."""
    import torch

    import graphopt
    import graphopt.program.compile
    from graphopt.models import load

    imported, begin = memory("VmRSS"), time.perf_counter()
    if bits == "4bit":
        source = load(MODEL, weights="packed")
        program = graphopt.compile(source, activations="int8", kv_dtype="float16", threads=threads)
    else:
        program = graphopt.compile(load(MODEL, dtype=torch.bfloat16), threads=threads)
    seconds = {**program.report.seconds, "all": time.perf_counter() - begin}
    added = memory("VmHWM") - imported
    program.save(folder)
    files = {path.name: path.stat().st_size / 1e6 for path in folder.glob("*.safetensors")}
    return {"seconds": seconds, "memory_added_mb": added, "files_mb": files}


def graphopt_peer(folder: Path, threads: int) -> tuple[Measure, Profile]:
    """The saved program in `folder`."""
    import graphopt

    program = graphopt.load_program(folder, threads=threads)
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


def in_another_process(peer: str, folder: Path, threads: int) -> dict[str, Any]:
    """`compile_and_save` where its memory is counted on its own."""
    command = [sys.executable, __file__, peer, "--threads", str(threads), "--compile", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"compiling {peer} failed: {done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def worker(peer: str, gguf: str, threads: int) -> None:
    """Load, then answer commands: a workload's name, or `profile NAME`; one JSON line each."""
    if peer == "llama.cpp":
        import llama_cpp

        versions = {"llama-cpp-python": llama_cpp.__version__}
    else:
        import torch
        import transformers

        import graphopt.models

        # Everything that the peers would import while they load.
        import graphopt.program.compile
        import graphopt.program.save

        torch.set_num_threads(threads)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        versions["graphopt"] = graphopt.__version__
    imported = memory("VmRSS")
    begin = time.perf_counter()
    profile: Profile | None = None
    hello: dict[str, Any] = {"versions": versions}
    if peer == "llama.cpp":
        measure = llama_peer(gguf, threads)
    elif peer == "hf-bf16":
        measure = hf_peer()
    else:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "program"
            hello["compile"] = in_another_process(peer, folder, threads)
            begin = time.perf_counter()
            measure, profile = graphopt_peer(folder, threads)
    print(json.dumps(hello | {"load_s": time.perf_counter() - begin}), flush=True)
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


def main() -> None:
    """Command line, as `decode_cpu.py` writes it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--gguf", default="")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--compile", type=Path, help="compile, save to this folder, and end")
    arguments = parser.parse_args()
    if arguments.compile:
        bits = arguments.peer.removeprefix("graphopt-")
        print(json.dumps(compile_and_save(bits, arguments.compile, arguments.threads)))
        return
    worker(arguments.peer, arguments.gguf, arguments.threads)


if __name__ == "__main__":
    main()
