"""Numeric check of every pass: the graph is run before and after it on the same inputs.

An instrument (`compile(check="numerics")`, or GRAPHOPT_CHECK=1). What a pass may change is its
tier: nothing (exact: bit for bit), rounding (reassociating), or the model (approximate: recorded,
not judged). A pass that changes more raises NumericsError with the rewrite that does it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.check.bisect import locate
from graphopt.check.oracle import fitting, outputs_of, random_inputs, relative_error, same_bits
from graphopt.errors import BackendError, NumericsError
from graphopt.ir.graph import Graph
from graphopt.passes.base import Pass
from graphopt.record.report import NumericChange, PassRecord, Report

LEAST_TOLERANCE = 1e-5
"""Rounding that the depth of a model makes of one rewrite's, relative, in float32."""


class NumericsCheck:
    """See the module docstring.

    inputs: of the captured graph, in its order; random ones by default. RequestError is raised at
    the first pass when they do not fit.
    """

    def __init__(self, report: Report, inputs: Sequence[Tensor] | None = None) -> None:
        self.report = report
        self._inputs: Any = inputs
        self._before: Graph | None = None
        self._expected: tuple[Tensor, ...] | None = None

    def _tell(self, text: str) -> None:
        if text not in self.report.notes:
            self.report.note(text)

    def before(self, pass_: Pass[Any], graph: Graph) -> None:
        """Keep the graph, and what it computes."""
        del pass_
        if self._inputs is None:
            self._inputs = random_inputs(graph)
        elif self._before is None:
            self._inputs = fitting(graph, self._inputs)
        self._before = graph.copy()
        try:
            self._expected = outputs_of(graph, self._inputs)
            floats = [tensor for tensor in self._expected if tensor.is_floating_point()]
            if floats and not any(bool(tensor.isfinite().any()) for tensor in floats):
                self._tell(
                    "numeric check: every output of the model is nan or infinite on these "
                    "inputs, so little can be seen; give others as check_inputs="
                )
        except BackendError:
            # Low-bit weights have no data of their own before they are folded in.
            self._expected = None

    def after(self, pass_: Pass[Any], graph: Graph, record: PassRecord) -> None:
        """Compare. Raises NumericsError."""
        del record
        assert self._inputs is not None
        assert self._before is not None
        if self._expected is None:
            self._tell(
                "numeric check: low-bit weights have no values before they are folded in; "
                "the passes before that are not checked (weights='dense' checks all)"
            )
            return
        found = outputs_of(graph, self._inputs, self._expected)
        change = measure(pass_.name, found, self._expected)
        self.report.numerics.append(change)
        if keeps_tier(pass_, change, found, self._expected):
            return
        allowed = allowance(pass_, self._expected)
        site = locate(type(pass_), self._before, self._inputs, allowed)
        where = ""
        if site is not None:
            where = f"; the first such rewrite is {site.name} in {site.layer or 'the model'}"
            where += f" at {site.source}" if site.source else ""
        raise NumericsError(f"pass {pass_.name!r} {excess(pass_, change, allowed)}{where}")


def keeps_tier(
    pass_: Pass[Any],
    change: NumericChange,
    found: Sequence[Tensor],
    expected: Sequence[Tensor],
) -> bool:
    """True when a pass changed the outputs no more than its tier allows."""
    if pass_.tier.kind == "exact":
        return same_bits(found, expected)
    return change.max_relative <= allowance(pass_, expected)


def excess(pass_: Pass[Any], change: NumericChange, allowed: float) -> str:
    """What a pass did that its tier does not allow, in words that follow its name."""
    return (
        f"changes the outputs by {change.max_relative:.2e} relative "
        f"({change.max_absolute:.2e} absolute, {change.max_ulp:.0f} ulp); its tier "
        f"{pass_.tier.kind!r} allows {allowed:.0e}"
    )


def allowance(pass_: Pass[Any], expected: Sequence[Tensor]) -> float:
    """Largest relative change of the outputs that a pass's tier allows."""
    if pass_.tier.kind == "exact":
        return 0.0
    if pass_.tier.kind == "approximate":
        return math.inf
    floats = [tensor.dtype for tensor in expected if tensor.is_floating_point()]
    coarsest = max((torch.finfo(dtype).eps for dtype in floats), default=0.0)
    factor = max(1.0, coarsest / torch.finfo(torch.float32).eps)
    return max(pass_.tier.tolerance, LEAST_TOLERANCE) * min(factor, 5e3)


def measure(name: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> NumericChange:
    """Largest change of any output: absolute, relative to the output's largest value, in ulp of
    that value."""
    relative = relative_error(found, expected)
    if math.isinf(relative):
        return NumericChange(name, math.inf, math.inf, math.inf)
    absolute, ulp = 0.0, 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if theirs.is_floating_point() and theirs.numel():
            difference = float((ours.double() - theirs.double()).abs().nan_to_num().max())
            scale = float(theirs.double().abs().nan_to_num(posinf=0.0).max())
            absolute = max(absolute, difference)
            if scale:
                ulp = max(ulp, difference / (scale * torch.finfo(theirs.dtype).eps))
    return NumericChange(name, absolute, relative, ulp)
