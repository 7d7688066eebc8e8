"""`compile(expect={...})` and `testing.expect`: names are checked before the run, counts after it.

A name with a dot is an op ("graphopt.rope"), any other a pass ("fuse_rope"). Ops are counted in the
forward graph, or in the serving graph when only that has them ("graphopt.paged_attention").
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from graphopt.errors import ExpectationError, PassError, UnsupportedError, did_you_mean
from graphopt.ir.graph import Graph
from graphopt.ir.opset import load_all
from graphopt.ir.size_arithmetic import SIZE_FUNCTIONS
from graphopt.passes.registry import find
from graphopt.record.report import Report


def check_names(expect: Mapping[str, int], running: Collection[str]) -> None:
    """Raise PassError for an op or pass that does not exist, a pass that does not run, or a count
    that is none."""
    if not isinstance(expect, Mapping):
        raise PassError(f"expect={expect!r} must be a dict: expect={{'fuse_norm': 61}}")
    for name, count in expect.items():
        if not isinstance(name, str):
            raise PassError(f"expect holds {name!r}, which is the name of no op or pass")
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise PassError(f"expect={{{name!r}: {count!r}}}: a count is an integer >= 0")
        if "." in name:
            known = _op_names()
            if name not in known:
                raise PassError(f"expect names {name!r}, which is no op{did_you_mean(name, known)}")
        else:
            find(name)
            if name not in running:
                raise PassError(f"expect names {name!r}, which is disabled or not in this run")


def check_counts(
    expect: Mapping[str, int], graph: Graph | None, serving: Graph | None, report: Report
) -> None:
    """Raise ExpectationError with a line for every count that differs, and UnsupportedError for an
    op where there is no graph to count it in."""
    wrong = []
    for name, wanted in expect.items():
        found, text = _count_op(name, graph, serving) if "." in name else _count_sites(name, report)
        if found != wanted:
            wrong.append(f"expected {wanted} of {name}, {text}")
    if wrong:
        raise ExpectationError("\n".join(wrong))


def _count_op(name: str, graph: Graph | None, serving: Graph | None) -> tuple[int, str]:
    if graph is None:
        raise UnsupportedError(
            f"a report counts rewrites, not ops such as {name!r}: give the program or the graph"
        )
    found, place = graph.op_counts()[name], "forward"
    if not found and serving is not None and name in serving.op_counts():
        found, place = serving.op_counts()[name], "serving"
    return found, f"found {found} in the {place} graph"


def _count_sites(name: str, report: Report) -> tuple[int, str]:
    found, reasons = report.sites(name), report.rejections(name)
    text = f"found {found}; rejected {len(reasons)}"
    if reasons:
        text += f", first: {reasons[0].text} ({reasons[0].source}) [{reasons[0].code}]"
    return found, text


def _op_names() -> set[str]:
    """Every op of this process, spelled as `op_name` spells it."""
    load_all()
    registered: list[str] = torch._C._dispatch_get_all_op_names()
    return {name.replace("::", ".") for name in registered} | {f"sym.{n}" for n in SIZE_FUNCTIONS}
