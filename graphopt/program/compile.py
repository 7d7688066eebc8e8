"""`graphopt.compile`: capture, passes, lowering, in that order, into a `Program`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.export import ExportedProgram

from graphopt.capture import ModelSource, capture
from graphopt.capture.arguments import Example
from graphopt.capture.capture import Dynamic
from graphopt.capture.export import refuse_random
from graphopt.check.edit import Edit, EditAfter
from graphopt.check.expect import check_counts, check_names
from graphopt.check.inputs import longest_sequence, size_limits
from graphopt.check.numerics import NumericsCheck
from graphopt.codegen.registry import select
from graphopt.config import Config
from graphopt.errors import RequestError, UnsupportedError, WeightFormatError
from graphopt.ir.graph import Graph
from graphopt.ir.weights import owned
from graphopt.models import GenerationDefaults, end_token_ids, generation_defaults, load
from graphopt.models.schema import TOKEN
from graphopt.passes.manager import Instrument, PassManager
from graphopt.passes.recipe import SERVING_PASS, plan_passes
from graphopt.program.context import narrowing, stated_context
from graphopt.program.options import (
    check_choices,
    check_edits,
    check_instruments,
    check_source,
    check_threads,
)
from graphopt.program.program import Program, ProgramOptions
from graphopt.record.dump import Dump, DumpWriter, as_dump
from graphopt.record.report import Rejection, Report, grouped
from graphopt.record.trace import TraceRecorder
from graphopt.runtime.request import SamplingParams, sampling_from_plain

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
    enable: Iterable[str] = (),
    disable: Iterable[str] = (),
    limits: Mapping[str, int] | None = None,
    expect: Mapping[str, int] | None = None,
    instruments: Sequence[Instrument] = (),
    dump: str | Path | Dump | None = None,
    check: Literal["numerics"] | None = None,
    check_inputs: Sequence[Tensor] | None = None,
    edit: Mapping[str, Edit] | None = None,
    threads: int | None = None,
) -> Program:
    """Compile a model.

    The program has its weights in memory of its own, on every backend: it stays what was compiled
    when the model is trained on or loaded anew. A second copy of the weights is the price for a
    model that the caller keeps; one that is given by name is not kept.

    model: an nn.Module in eval mode, what `graphopt.models.load` returned, a reference that it
        takes ("smollm2-135m", a folder, a GGUF file), an ExportedProgram, or a captured Graph.
    example, dynamic: as for `graphopt.capture`.
    backend: "cpu", "reference", or the name of a plugin's.
    activations: "float", or "int8": low-bit layers round their inputs to int8 in groups of 32
        (faster; changes results by about the rounding, see docs).
    kv_dtype: storage of the KV cache: "auto" (the model's dtype), "float32", "float16", "bfloat16".
    serving: derive the graph with a KV cache: "auto" (when the proof holds; otherwise
        `program.refusal` says why), "required" (raise RowDependenceError), "off".
    passes: exact names of the passes to run instead of the default ones.
    enable: exact names of passes to run as well, such as "merge_qkv", which is off by default.
    disable, limits: exact pass names to leave out; highest number of rewrites of a pass.
    expect: {"fuse_norm": 61} or {"graphopt.rms_norm": 61}: raises ExpectationError when a pass
        applied, or the graph holds, another number.
    dump: folder for the graph text after each pass that changed something, what it changed, and a
        summary; a `graphopt.Dump` leaves parts out. Default: GRAPHOPT_DUMP. `Program.dump` writes
        the same later.
    check: "numerics": run the graph before and after every pass, and raise NumericsError when a
        pass changes more than its tier allows; `program.report.numerics` has the figures. Default:
        GRAPHOPT_CHECK. check_inputs: recorded inputs to run on; random ones by default.
    edit: pass name -> function that gets the graph text after the pass and returns the text to go
        on with: `text -> text`, or `(text, error) -> text`, which is asked again while its text
        cannot be read; see `graphopt.check.edit.Edit`.
    threads: of the cpu backend; default: as many as torch uses.
    """
    if check not in (None, "numerics"):
        raise UnsupportedError(f"check={check!r} is not supported; supported: 'numerics', None")
    if check_inputs is not None and check is None:
        raise UnsupportedError("check_inputs has no effect without check='numerics'")
    check_choices(backend, activations, kv_dtype, serving)
    check_threads(backend, threads)
    check_source(model, example, dynamic)
    report, config = Report(), Config.from_environment()
    plan = plan_passes(passes, enable, disable, limits, activations, serving)
    given_instruments = check_instruments(instruments)
    expected = {} if expect is None else expect
    check_names(expected, plan.running)
    edits = check_edits(edit, plan.running)
    dumped = as_dump(config.dump if dump is None else dump, plan.running)
    writer = None if dumped is None else DumpWriter(dumped)
    recorder = TraceRecorder(
        report, is_checked=config.reread, listener=None if writer is None else writer.step
    )
    watchers: list[Instrument] = [recorder, *given_instruments]
    if check == "numerics" or config.check:
        watchers.append(NumericsCheck(report, check_inputs))
    if edits:
        watchers.append(EditAfter(edits, report, recorder))

    with report.timed("load"):
        source = load(model) if isinstance(model, str) else model
    defaults = _generation_defaults(source)
    sampling, end_tokens = _sampling(defaults), _end_tokens(source)
    for text in defaults.notes:
        report.note_model(text)
    with report.timed("capture"):
        if isinstance(source, Graph):
            graph = source.copy()
        else:
            graph = capture(source, example, dynamic=dynamic)
        refuse_random(graph)
    for note in graph.notes:
        report.note(note)
    sizes = size_limits(graph)
    report.limits = [limit.told() for limit in sizes]
    for limit in narrowing(sizes, stated_context(_module_config(source))):
        report.note(limit.narrows())

    serving_graph, refusal = None, None
    try:
        with report.timed("passes"):
            recorder.captured(graph)
            forward = PassManager(
                plan.forward, disable=plan.disabled, limits=plan.limits, instruments=watchers
            )
            forward.run(graph, report)
            if plan.serving:
                serving_graph = graph.copy()
                cached = PassManager(plan.serving, limits=plan.limits, instruments=watchers)
                cached.run(serving_graph, report)
        if serving_graph is None:
            refusal = _not_asked(serving)
        elif serving_graph.dialect != "serving":
            serving_graph = None
            refusals = report.rejections(SERVING_PASS)
            refusal = refusals[-1] if refusals else None
        made = (*graph.assumptions, *(serving_graph.assumptions if serving_graph else ()))
        report.assumptions += map(str, made)
        check_counts(expected, graph, serving_graph, report)
        if activations == "int8" and not report.sites("quantize_activations"):
            report.note(_why_not_int8(report))

        with report.timed("lower"):
            options = ProgramOptions(
                name=graph.name,
                backend=backend,
                kv_dtype=kv_dtype,
                max_context=_max_context(source, graph),
                eos_token_ids=end_tokens,
                default_sampling=sampling,
            )
            tokenizer = source.tokenizer if isinstance(source, ModelSource) else None
            if isinstance(model, str):
                # Nobody else holds the loaded module: let its weights go as they are packed.
                del source
            else:
                owned(graph.weights, {} if serving_graph is None else serving_graph.weights)
            program = Program(
                graph,
                serving_graph,
                refusal,
                options,
                select(backend, report.note, threads),
                report,
                tokenizer,
                recorder.trace,
            )
    except Exception as error:
        if writer is not None:
            writer.failed(
                serving_graph or graph,
                report,
                recorder.trace,
                recorder.running,
                backend,
                error,
            )
        raise
    if writer is not None:
        writer.finish(options.name, report, recorder.trace, program.kernel_calls, backend)
    if serving == "required":
        _ = program.executable
    return program


def _not_asked(serving: str) -> Rejection:
    """Why there is no serving graph when nobody wanted one."""
    if serving == "off":
        text, mend = "it was compiled with serving='off'", "compile with serving='auto'"
        return Rejection("serving-off", text, "", "", "", mend)
    text = f"it was compiled with passes= that leave out {SERVING_PASS!r}"
    return Rejection("pass-left-out", text, "", "", "", f"add {SERVING_PASS!r} to passes=")


def _why_not_int8(report: Report) -> str:
    reasons = grouped(report.rejections("quantize_activations"))
    why = (
        f"every low-bit layer was left alone ({reasons[0][0]})"
        if reasons
        else "the model has no low-bit layers; load a GGUF file with weights='packed'"
    )
    return f"activations='int8' changed nothing: {why}"


def _generation_defaults(source: Any) -> GenerationDefaults:
    if isinstance(source, ModelSource):
        return GenerationDefaults(source.sampling, source.notes)
    return generation_defaults(source)


def _sampling(defaults: GenerationDefaults) -> SamplingParams:
    try:
        return sampling_from_plain(defaults.settings)
    except RequestError as error:
        raise WeightFormatError(
            f"the model's generation configuration has a value of another kind: {error}"
        ) from error


def _end_tokens(source: Any) -> tuple[int, ...]:
    """Raises WeightFormatError for what is no token id."""
    if not isinstance(source, ModelSource):
        return end_token_ids(source)
    if not all(map(TOKEN.allows, source.eos_token_ids)):
        raise WeightFormatError(
            f"{source.name} has eos_token_ids={source.eos_token_ids}; each must be {TOKEN}"
        )
    return tuple(source.eos_token_ids)


def _module_config(source: Any) -> Any:
    module = source.module if isinstance(source, ModelSource) else source
    return getattr(module, "config", None)


def _max_context(source: Any, graph: Graph) -> int | None:
    """The smaller of what the configuration says and what the capture found."""
    stated = stated_context(_module_config(source), ("max_position_embeddings",))
    found = longest_sequence(graph)
    return min((n for n in (stated, found) if isinstance(n, int)), default=None)
