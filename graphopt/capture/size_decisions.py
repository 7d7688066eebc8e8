"""What a capture decides about symbolic sizes, and which line of the model asked.

torch.export follows one road through a model, the one of its example: each time Python or an op
asks whether `n > 24`, the answer for the example is taken. torch checks only part of these answers
for other sizes (not those about two sizes, not those about 1, which it never gives to a symbolic
size). So every question is written down here, with its answer and its place.
"""

from __future__ import annotations

import os.path
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import BooleanFunction
from torch.fx.experimental import sym_node, symbolic_shapes
from torch.fx.experimental.symbolic_shapes import ShapeEnv

_TORCH = os.path.dirname(torch.__file__)
_OWN = os.path.dirname(__file__)
_STDLIB = sysconfig.get_path("stdlib")
_MACHINERY = {symbolic_shapes.__file__, sym_node.__file__, __file__}
_CONVERSIONS = {"__bool__", "__int__", "__index__", "__float__"}
# Python of torch that decides what a model computes; the rest of torch is about shapes and strides.
_MODEL_CODE = (os.path.join(_TORCH, "nn", ""), os.path.join(_TORCH, "functional.py"))
# They ask only how a tensor lies in memory.
_LAYOUT = (
    "is_contiguous",
    "is_contiguous_or_false",
    "check_contiguous_sizes_strides",
    "are_strides_like_channels_last_or_false",
    "are_strides_like_channels_last",
    "is_channels_last_contiguous_2d",
    "is_channels_last_contiguous_3d",
    "is_non_overlapping_and_dense",
    "is_non_overlapping_and_dense_or_false",
    "compute_elementwise_output_logical_to_physical_perm",
    "_reshape_view_helper_core_alg",
)
# transformers expands position ids to the batch there, unless it is 1: then both are one row.
_SAME_FOR_ONE = {("masking_utils.py", "_preprocess_mask_arguments")}


@dataclass(frozen=True, slots=True)
class Decision:
    """One answer.

    condition: what the capture took for true. source: file and line of the innermost model code
    ("model.py:12"). is_branch: Python asked, in a model's code or in torch.nn; else an op did.
    is_layout: an op asked how a tensor lies in memory. is_assert: the model asserts it.
    is_same_for_one: known to make no difference where the size is 1.
    """

    condition: sympy.Basic
    source: str
    is_branch: bool
    is_layout: bool
    is_assert: bool
    is_same_for_one: bool = False


@dataclass(slots=True)
class Decisions:
    """All answers of one export. shape_env: None when no size was asked about."""

    found: dict[tuple[Any, ...], Decision] = field(default_factory=dict)
    shape_env: ShapeEnv | None = None

    def add(self, shape_env: ShapeEnv, expr: sympy.Basic, answer: Any, frame: FrameType) -> None:
        """Write down the answer to `expr` that the code in `frame` asked for."""
        self.shape_env = shape_env
        is_converted = False
        place: FrameType | None = frame
        while place is not None:
            file = place.f_code.co_filename
            if file in _MACHINERY:
                pass
            elif place.f_code.co_name in _CONVERSIONS and file == torch.__file__:
                is_converted = True
            else:
                break
            place = place.f_back
        if place is None:
            return
        key: tuple[Any, ...] = (expr, answer, place.f_code, place.f_lineno)
        if key in self.found and is_model_file(place.f_code.co_filename):
            return
        file = place.f_code.co_filename
        is_branch = is_converted and (not file.startswith(_TORCH) or file.startswith(_MODEL_CODE))
        user = _user_frame(place)
        source, is_assert = "", False
        if user is not None:
            key = (*key, user.f_code, user.f_lineno)
            source = f"{os.path.basename(user.f_code.co_filename)}:{user.f_lineno}"
            if is_branch and user is place:
                is_assert = _is_assert(user)
        if key in self.found:
            return
        if isinstance(expr, (sympy.Rel, BooleanFunction)):
            condition = expr if bool(answer) else sympy.Not(expr)
        else:
            condition = sympy.Eq(expr, answer)
        is_layout = not is_branch and place.f_code.co_name in _LAYOUT
        asked_by = (os.path.basename(file), place.f_code.co_name)
        self.found[key] = Decision(
            condition, source, is_branch, is_layout, is_assert, asked_by in _SAME_FOR_ONE
        )


@contextmanager
def recorded_decisions() -> Iterator[Decisions]:
    """Within, every question about a symbolic size that this thread asks is written down.

    torch makes its ShapeEnv inside the export and offers no hook on it, so its class is changed for
    the time of the block; other threads are let through.
    """
    decisions, thread = Decisions(), threading.get_ident()
    original: Any = ShapeEnv.evaluate_expr

    def evaluate_expr(self: ShapeEnv, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, orig_expr, *args, **kwargs)
        if threading.get_ident() == thread and getattr(orig_expr, "free_symbols", None):
            decisions.add(self, orig_expr, answer, sys._getframe(1))
        return answer

    ShapeEnv.evaluate_expr = evaluate_expr  # type: ignore[method-assign]
    try:
        yield decisions
    finally:
        ShapeEnv.evaluate_expr = original  # type: ignore[method-assign]


def is_model_file(file: str) -> bool:
    """True for a file that is neither torch's, Python's own, nor part of this capture."""
    if file.startswith((_TORCH, _OWN)) or file.startswith("<"):
        return False
    return "site-packages" in file or not file.startswith(_STDLIB)


def _user_frame(frame: FrameType | None) -> FrameType | None:
    while frame is not None and not is_model_file(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def _is_assert(frame: FrameType) -> bool:
    import linecache

    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return line.lstrip().startswith("assert")
