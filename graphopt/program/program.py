"""What `compile` returns: the graphs, the weights, and what runs them.

A Program is called like the model (`program(ids)` -> logits), generates text, and can be saved to a
folder of text, safetensors and a manifest: no pickle anywhere.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from graphopt.check.inputs import check_inputs, input_types, sequence_name, size_limits
from graphopt.check.oracle import whole_prompt_logits
from graphopt.codegen.backend import Backend, ForwardExecutable, ServingExecutable
from graphopt.errors import RequestError, RowDependenceError, ScoreRangeError, did_you_mean
from graphopt.ir.assumptions import check_assumptions
from graphopt.ir.graph import Graph, shape_of
from graphopt.ir.limits import Limit, lowest
from graphopt.program.chat_template import chat_ids
from graphopt.record.calls import KernelCall
from graphopt.record.dump import Dump, write_dump
from graphopt.record.report import Rejection, Report
from graphopt.record.trace import Trace
from graphopt.runtime import Completion, Engine, SamplingParams, TokenEvent
from graphopt.runtime.request import sampling_params

KV_DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

_WHOLE = "call the program itself, which computes whole sequences"
"""What works where nothing in the model can be changed to give it a KV cache."""


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _untraced(method: _Method) -> _Method:
    """What torch.compile calls as it is: a program is compiled already."""
    return cast(_Method, torch.compiler.disable(method))  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class ProgramOptions:
    """What a saved program must remember.

    backend: "cpu" or "reference". kv_dtype: a key of KV_DTYPES. max_context: tokens, or None.
    default_sampling: how to choose tokens when nobody says otherwise; the model's own wishes.
    """

    name: str
    backend: str
    kv_dtype: str = "auto"
    max_context: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    default_sampling: SamplingParams = field(default_factory=SamplingParams)


class Program:
    """A compiled model.

    graph: the optimised forward (ids -> logits). serving: the graph with a paged KV cache, or None
    with the reason in `refusal`. report: what every pass did. trace: the graph text as each pass
    left it, kept by saved programs, too.
    """

    def __init__(
        self,
        graph: Graph,
        serving: Graph | None,
        refusal: Rejection | None,
        options: ProgramOptions,
        backend: Backend,
        report: Report,
        tokenizer: Any = None,
        trace: Trace | None = None,
    ) -> None:
        self.graph, self.serving, self.refusal = graph, serving, refusal
        self.options, self.report, self.tokenizer = options, report, tokenizer
        self.trace = Trace() if trace is None else trace
        self._backend = backend
        self._input_types = input_types(graph)
        self._limits = size_limits(graph)
        self._forward: ForwardExecutable | None = None
        self._serving: ServingExecutable | None = None
        if serving is not None:
            # One table of weights for both graphs, so that lowering can release each weight once.
            shared = {**graph.weights, **serving.weights}
            graph.weights = serving.weights = shared
            self._serving = backend.lower_serving(
                serving, KV_DTYPES[options.kv_dtype], options.max_context
            )

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The sizes it takes: every condition that capture or a table of the model set, with the
        line of the model that caused it."""
        return self._limits

    @property
    def executable(self) -> ServingExecutable:
        """The lowered serving graph. Raises RowDependenceError when there is none."""
        if self._serving is None:
            raise RowDependenceError(self._why_no_serving())
        return self._serving

    @property
    def kernel_calls(self) -> tuple[KernelCall, ...]:
        """What runs each value of the serving graph; empty without one."""
        return () if self._serving is None else self._serving.kernel_calls

    def _why_no_serving(self) -> str:
        if self.refusal is None:
            return f"{self.options.name} was saved without a graph that has a KV cache"
        place = f" at {self.refusal.source}" if self.refusal.source else ""
        layer = f" in {self.refusal.layer}" if self.refusal.layer else ""
        return (
            f"{self.options.name} cannot be served with a KV cache: {self.refusal.text}"
            f"{place}{layer} [{self.refusal.code}]; {self.refusal.mend or _WHOLE}"
        )

    @_untraced
    def __call__(self, *inputs: Tensor, **named: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits `[B, S, V]` for ids `[B, S]`, or what the model's forward returns (the last row,
        say).

        Models with other inputs (a padding mask) take them in the captured order or by name.
        Raises RequestError when inputs are missing, unknown, of another dtype or shape than the
        graph was captured for, when ids are out of range, and when values are not what a rewrite
        assumed (`program.graph.assumptions`).
        """
        names = [spec.name for spec in self.graph.inputs]
        values = _bind(names, inputs, named)
        check_inputs(self._input_types, values, self._limits)
        check_assumptions(self.graph.assumptions, names, values)
        try:
            if self._serving is not None and len(values) == 1:
                (logits,) = self.graph.output_nodes
                # The graph without a cache computes the hidden keys, too.
                with suppress(ScoreRangeError):
                    return whole_prompt_logits(self.executable, values[0], shape_of(logits))
            if self._forward is None:
                self._forward = self._backend.lower(self._with_weights(self.graph))
            outputs = self._forward(*values)
        except IndexError as error:
            # Positions that the graph computes are known only as it runs.
            raise RequestError(f"an id or a position is outside its table: {error}") from error
        return outputs[0] if len(outputs) == 1 else outputs

    def engine(self, **options: Any) -> Engine:
        """A generation engine over this program; options as in `graphopt.runtime.Engine`.

        Raises RequestError for options that do not exist or are out of range.
        """
        known = [
            name
            for name, parameter in inspect.signature(Engine).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        ]
        for name in options:
            if name not in known:
                raise RequestError(
                    f"the engine has no option {name!r}; there are {', '.join(known)}"
                    + did_you_mean(name, known)
                )
        sequence = sequence_name(self._input_types)
        limit = None if sequence is None else lowest(self._limits, sequence)
        shortest = (1, "") if limit is None else (limit.number, limit.reason())
        return Engine(
            self.executable,
            self.tokenizer,
            self.options.eos_token_ids,
            self.options.default_sampling,
            shortest,
            **options,
        )

    def generate(
        self,
        prompts: str | Sequence[int] | Tensor | Sequence[str | Sequence[int] | Tensor],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Complete one prompt or several, batched together.

        A prompt is a text, or token ids as a list, a tensor or an array of one dimension.
        Sampling settings come as `params` (one for all, or one a prompt) or as its fields
        (`max_tokens=64, temperature=0.7`). Fields that are not given are those of
        `options.default_sampling`, which a model's generation configuration sets; `params` are
        taken as they are.
        """
        chosen = sampling_params(params, sampling, self.options.default_sampling)
        return self.engine().generate(_prompts(prompts), chosen)

    def stream(
        self,
        prompt: str | Sequence[int] | Tensor,
        params: SamplingParams | None = None,
        **sampling: Any,
    ) -> Iterator[TokenEvent]:
        """Complete one prompt, token by token; sampling settings as for `generate`."""
        chosen = sampling_params(params, sampling, self.options.default_sampling)
        return self.engine().stream(cast(Any, prompt), chosen)

    def chat_prompt(self, message: str) -> list[int]:
        """Token ids of a user message in the model's chat template.

        The template runs in a process of its own, one second and half a gigabyte at most. Raises
        RequestError for one that takes more or fails, and without a tokenizer.
        """
        if self.tokenizer is None:
            raise RequestError("this program has no tokenizer; pass token ids")
        return chat_ids(self.tokenizer, message)

    def weights(self) -> Mapping[str, Tensor]:
        """All weights by name, those held in kernel layouts converted back bit for bit."""
        taken = {} if self._serving is None else self._serving.original_weights()
        return {**self.graph.weights, **taken}

    def _with_weights(self, graph: Graph) -> Graph:
        whole = graph.copy()
        available = self.weights()
        whole.weights = {name: available[name] for name in graph.weights if name in available}
        whole.prune_weights()
        return whole

    def dump(self, to: str | Path | Dump) -> None:
        """Write what each pass did to a folder, as `compile(dump=...)` does.

        Raises UnsupportedError for a folder with other files of these names, PassError for a filter
        that names no pass of the compilation, NoRecordError for a program saved without a trace.
        """
        options = self.options
        write_dump(to, options.name, self.report, self.trace, self.kernel_calls, options.backend)

    def save(self, folder: str | Path) -> None:
        """Write the program to a new or empty folder; see `graphopt.load_program`."""
        from graphopt.program.save import save_program

        save_program(self, folder)


def _prompts(prompts: Any) -> list[Any]:
    """One prompt or several as a list of prompts; the engine checks each."""
    if isinstance(prompts, str) or hasattr(prompts, "tolist"):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(
            "generate takes a text, a sequence of token ids, or a list of those, not "
            f"{type(prompts).__name__}"
        )
    is_one = len(prompts) > 0 and (
        isinstance(prompts[0], numbers.Integral) or getattr(prompts[0], "ndim", None) == 0
    )
    return [prompts] if is_one else list(prompts)


def _bind(
    names: Sequence[str], inputs: Sequence[Tensor], named: Mapping[str, Tensor]
) -> list[Tensor]:
    if len(inputs) > len(names):
        raise RequestError(f"{len(inputs)} inputs given, the program takes {list(names)}")
    values = dict(zip(names, inputs, strict=False))
    for name, value in named.items():
        if name not in names:
            raise RequestError(
                f"no input called {name!r}; the program takes {list(names)}"
                + did_you_mean(name, names)
            )
        if name in values:
            raise RequestError(f"input {name!r} is given twice")
        values[name] = value
    missing = [name for name in names if name not in values]
    if missing:
        raise RequestError(f"input {missing[0]!r} is missing; the program takes {list(names)}")
    return [values[name] for name in names]
