"""Sends a family of `hf_families` down one road to `graphopt.attention` and measures what arrived.

hook    `graphopt.capture(model, example)`: graphopt is the model's attention implementation
sdpa    the model exported by torch.export with transformers' SDPA, without graphopt, then captured
eager   the same with transformers' eager attention

All exports have a dynamic batch and dynamic lengths; values are compared with the eager model on
inputs of another batch and other lengths, at positions that are no padding.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from graphopt.capture import capture
from graphopt.codegen.reference import ReferenceBackend
from graphopt.ir.graph import Graph, argument
from graphopt.ops import attention
from graphopt.passes.manager import PassManager
from graphopt.passes.registry import all_passes
from graphopt.record.report import Rejection, Report
from graphopt.record.trace import TraceRecorder
from helpers.hf_families import MAX_POSITIONS, Family
from helpers.module_state import state_of, surroundings

Road = Literal["hook", "sdpa", "eager"]
ROADS: tuple[Road, ...] = ("hook", "sdpa", "eager")
EXAMPLE = (2, 9)
FRESH = (3, 13)
"""(batch, sequence) of the export's example and of the comparison; longer than every window."""

TOLERANCE = 1e-5
SDPA = torch.ops.aten.scaled_dot_product_attention.default
SOFTMAX = torch.ops.aten.softmax.int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one family on one road.

    dense: attentions that keep a mask operand; proven: that state what is visible or a bias as an
    attribute, or take a padding mask. rejections: of fuse_attention.
    error: largest difference from eager, relative to the largest eager value.
    """

    present: int
    fused: int
    dense: int
    proven: int
    softmaxes_left: int
    sdpa_left: int
    rejections: tuple[Rejection, ...]
    error: float
    graph: Graph = field(repr=False, compare=False)

    @property
    def wrong(self) -> bool:
        """Whether the fused graph computes something else; NaN counts."""
        return not self.error <= TOLERANCE

    @property
    def codes(self) -> Counter[str]:
        """Rejections by code."""
        return Counter(rejection.code for rejection in self.rejections)


def offers(model: PreTrainedModel, implementation: str) -> bool:
    """Whether transformers runs this model with the implementation; sets it when it does."""
    try:
        model.set_attn_implementation(implementation)
    except ValueError:
        return False
    return bool(model.config._attn_implementation == implementation)


def call_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor | bool]:
    """`inputs`, and no cache where the model would return one."""
    parameters = inspect.signature(model.forward).parameters
    has_cache = "use_cache" in parameters or hasattr(model.config, "use_cache")
    return {**inputs, "use_cache": False} if has_cache else dict(inputs)


def exported(model: PreTrainedModel, family: Family, masked: bool) -> ExportedProgram:
    """The model as someone without graphopt exports it: dynamic batch and lengths."""
    call = call_of(model, family.inputs(*EXAMPLE, masked))
    dims = {
        "batch": Dim("batch", max=1024),
        # A cut of a table is a view of the whole table at its full length: export tells them apart.
        "sequence": Dim("sequence", max=MAX_POSITIONS - 1),
        "target": Dim("target", max=MAX_POSITIONS - 1),
    }
    axes = family.axes(masked)
    shapes = {
        name: {axis: dims[dim] for axis, dim in axes[name].items()} if name in axes else None
        for name in call
    }
    with torch.no_grad():
        return torch.export.export(model, (), call, dynamic_shapes=shapes, strict=False)


def arrive(model: PreTrainedModel, family: Family, road: Road, masked: bool) -> Graph:
    """The captured graph, before any pass; the model is checked to be what it was. Raises what
    torch.export or `capture` raise."""
    if road == "hook":
        inputs, axes = family.inputs(*EXAMPLE, masked), family.axes(masked)
        before = state_of(model), surroundings()
        graph = capture(model, inputs, dynamic=axes)
        assert (state_of(model), surroundings()) == before, f"capture changed {family.name}"
        return graph
    if not offers(model, road):
        raise ValueError(f"transformers does not offer {road} for {family.name}")
    return capture(exported(model, family, masked))


def relative_error(graph: Graph, model: PreTrainedModel, family: Family, masked: bool) -> float:
    """Largest error of the graph's first output on fresh inputs, relative to the largest value."""
    model.set_attn_implementation("eager")
    inputs = family.inputs(*FRESH, masked)
    with torch.no_grad():
        expected = model(**call_of(model, inputs))[0]
        given = [inputs[spec.name] for spec in graph.inputs]
        actual = ReferenceBackend().lower(graph)(*given)[0]
    keep = family.valid(inputs)
    error = (actual[keep].double() - expected[keep].double()).abs().max()
    return float(error / expected[keep].double().abs().max())


def measure(family: Family, road: Road, masked: bool) -> Outcome:
    """Capture, clean, fuse, compare; the text after every pass reads back as the graph. Raises what
    `arrive` raises."""
    model = family.build()
    graph = arrive(model, family, road, masked)
    report = Report()
    stages = ("cleanup", "fuse")
    names = [name for name, cls in all_passes().items() if cls.stage in stages]
    recorder = TraceRecorder(report, is_checked=True)
    recorder.captured(graph)
    PassManager(names, instruments=[recorder]).run(graph, report)
    calls = list(graph.calls(attention.SPEC.overload))
    dense = [call for call in calls if argument(call, "mask") is not None]
    stated = ("causal", "window", "pad_BT", "predicate", "bias")
    return Outcome(
        present=family.attentions,
        fused=len(calls),
        dense=len(dense),
        proven=sum(
            any(argument(call, name) not in (None, 0, "") for name in stated) for call in calls
        ),
        softmaxes_left=len(list(graph.calls(SOFTMAX))),
        sdpa_left=len(list(graph.calls(SDPA))),
        rejections=tuple(report.rejections("fuse_attention")),
        error=relative_error(graph, model, family, masked),
        graph=graph,
    )
