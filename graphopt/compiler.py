"""`graphopt.compile`: capture, passes, lowering, in that order, into a `Program`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.export import ExportedProgram

from graphopt.capture import ModelSource, capture
from graphopt.capture.capture import Dynamic, Example
from graphopt.codegen.cpu.backend import BACKENDS, select
from graphopt.errors import ExpectationError, PassError, UnsupportedError
from graphopt.ir.graph import Graph
from graphopt.models import load
from graphopt.passes.instruments import DumpInstrument
from graphopt.passes.manager import Instrument, PassManager
from graphopt.passes.registry import all_passes, find
from graphopt.program import KV_DTYPES, Program, ProgramOptions
from graphopt.report import Report

Serving = Literal["auto", "required", "off"]
Activations = Literal["float", "int8"]


def compile(
    model: nn.Module | ModelSource | ExportedProgram | Graph | str,
    example: Example | None = None,
    *,
    dynamic: Dynamic | bool = True,
    backend: str = "cpu",
    activations: Activations = "float",
    kv_dtype: str = "auto",
    serving: Serving = "auto",
    passes: Sequence[str] | None = None,
    disable: Iterable[str] = (),
    limits: Mapping[str, int] | None = None,
    expect: Mapping[str, int] | None = None,
    instruments: Sequence[Instrument] = (),
    dump: str | Path | None = None,
    threads: int | None = None,
) -> Program:
    """Compile a model.

    model: an nn.Module in eval mode, what `graphopt.models.load` returned, a reference that it
        takes ("smollm2-135m", a folder, a GGUF file), an ExportedProgram, or a captured Graph.
    example, dynamic: as for `graphopt.capture`.
    backend: "cpu" or "reference".
    activations: "float", or "int8": low-bit layers round their inputs to int8 in groups of 32
        (faster; changes results by about the rounding, see docs).
    kv_dtype: storage of the KV cache: "auto" (the model's dtype), "float32", "float16", "bfloat16".
    serving: derive the graph with a KV cache: "auto" (when the proof holds; otherwise
        `program.refusal` says why), "required" (raise RowDependenceError), "off".
    passes: exact names of the passes to run instead of the default ones.
    disable, limits: exact pass names to leave out; highest number of rewrites of a pass.
    expect: {"fuse_norm": 61} or {"graphopt.rms_norm": 61}: raises ExpectationError when a pass
        applied, or the graph holds, another number.
    dump: folder that receives the graph text after each pass that changed something.
    threads: of the cpu backend; default: as many as torch uses.
    """
    _check_options(backend, activations, kv_dtype, serving, expect)
    report = Report()
    names = _pipeline(passes, activations)
    watchers = [*instruments, *([] if dump is None else [DumpInstrument(Path(dump))])]
    forward_names = [name for name in names if find(name).stage != "cache"]
    serving_names = [name for name in names if find(name).stage == "cache"]
    pipeline = PassManager(
        forward_names, disable=disable, limits=_of(limits, forward_names), instruments=watchers
    )
    start = time.perf_counter()
    source = load(model) if isinstance(model, str) else model
    report.seconds["load"] = time.perf_counter() - start

    start = time.perf_counter()
    graph = (
        source.copy() if isinstance(source, Graph) else capture(source, example, dynamic=dynamic)
    )
    report.seconds["capture"] = time.perf_counter() - start
    for watcher in watchers:
        if isinstance(watcher, DumpInstrument):
            watcher.captured(graph)

    start = time.perf_counter()
    pipeline.run(graph, report)
    serving_graph, refusal = None, None
    if serving != "off" and serving_names:
        serving_graph = graph.copy()
        PassManager(serving_names, limits=_of(limits, serving_names), instruments=watchers).run(
            serving_graph, report
        )
        if serving_graph.dialect != "serving":
            serving_graph = None
            refusals = report.rejections("insert_kv_cache")
            refusal = refusals[-1] if refusals else None
    report.seconds["passes"] = time.perf_counter() - start
    _check_expectations(expect or {}, graph, report)

    start = time.perf_counter()
    described = source if isinstance(source, ModelSource) else None
    options = ProgramOptions(
        name=graph.name,
        backend=backend,
        kv_dtype=kv_dtype,
        max_context=_max_context(source),
        eos_token_ids=described.eos_token_ids if described else _eos(source),
    )
    tokenizer = described.tokenizer if described else None
    if isinstance(model, str):
        # Nobody else holds the loaded module: let its weights go as they are packed.
        del source, described
    program = Program(
        graph, serving_graph, refusal, options, select(backend, report, threads), report, tokenizer
    )
    report.seconds["lower"] = time.perf_counter() - start
    if serving == "required":
        _ = program.executable
    return program


def _check_options(
    backend: str, activations: str, kv_dtype: str, serving: str, expect: Mapping[str, int] | None
) -> None:
    choices: dict[str, tuple[str, tuple[str, ...]]] = {
        "backend": (backend, BACKENDS),
        "activations": (activations, ("float", "int8")),
        "kv_dtype": (kv_dtype, tuple(KV_DTYPES)),
        "serving": (serving, ("auto", "required", "off")),
    }
    for option, (value, allowed) in choices.items():
        if value not in allowed:
            raise UnsupportedError(f"{option}={value!r} is not supported; supported: {allowed}")
    for name in expect or {}:
        if "." not in name:
            find(name)


def _pipeline(passes: Sequence[str] | None, activations: str) -> list[str]:
    if passes is not None:
        for name in passes:
            find(name)
        return list(passes)
    chosen = [name for name, cls in all_passes().items() if cls.tier.kind != "approximate"]
    return [*chosen, "quantize_activations"] if activations == "int8" else chosen


def _of(limits: Mapping[str, int] | None, names: Sequence[str]) -> dict[str, int]:
    for name in limits or {}:
        find(name)
    return {name: limit for name, limit in (limits or {}).items() if name in names}


def _check_expectations(expect: Mapping[str, int], graph: Graph, report: Report) -> None:
    ops = graph.op_counts()
    ran = {record.name for record in report.passes}
    for name, wanted in expect.items():
        found = ops[name] if "." in name else report.sites(name)
        if found == wanted:
            continue
        text = f"expected {wanted} of {name}, found {found}"
        if "." not in name:
            if name not in ran:
                raise PassError(f"expect names {name!r}, which did not run")
            reasons = report.rejections(name)
            text += f"; rejected {len(reasons)}"
            if reasons:
                text += f", first: {reasons[0].text} ({reasons[0].source}) [{reasons[0].code}]"
        raise ExpectationError(text)


def _module_config(source: Any) -> Any:
    module = source.module if isinstance(source, ModelSource) else source
    return getattr(module, "config", None)


def _max_context(source: Any) -> int | None:
    limit = getattr(_module_config(source), "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) else None


def _eos(source: Any) -> tuple[int, ...]:
    token = getattr(_module_config(source), "eos_token_id", None)
    if isinstance(token, int):
        return (token,)
    return tuple(token) if isinstance(token, (list, tuple)) else ()
