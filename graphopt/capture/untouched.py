"""The user's model after capture is the model before it, whatever happens in between.

Tracing runs `forward` on fake tensors, and a forward may keep what it computes: in buffers, plain
attributes, a cache in a dict, a configuration, a class attribute, a global of its file or a
function with `functools.lru_cache`. `untouched` puts all of it back, and what lies around the
model: the random states of torch, Python and numpy, grad mode, autocast and the default dtype.
`each_run_untouched` does the same for every single run, and `check_forgets` refuses a model whose
outputs depend on what it kept.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils import _pytree as pytree

from graphopt.capture.outputs import plain
from graphopt.capture.snapshot import Change, Snapshot
from graphopt.errors import CaptureError


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Within, `module` may be run and traced at will; afterwards it is bitwise what it was."""
    snapshot = Snapshot(module, with_contents=True)
    with _surroundings():
        try:
            yield
        finally:
            snapshot.restore()


@contextmanager
def _surroundings() -> Iterator[None]:
    """Put back the process-wide state that a forward may change."""
    has_cuda: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if has_cuda else ()
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = None if numpy is None else numpy.random.get_state()
    default_dtype = torch.get_default_dtype()
    autocast = {kind: torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")}
    is_grad_enabled = torch.is_grad_enabled()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        torch.set_default_dtype(default_dtype)
        for kind, is_enabled in autocast.items():
            torch.set_autocast_enabled(kind, is_enabled)
        torch.set_grad_enabled(is_grad_enabled)


@contextmanager
def each_run_untouched(module: nn.Module, changes: list[Change]) -> Iterator[None]:
    """Within, every run of `module.forward` starts from the same state.

    torch.export runs forward more than once; what the first run kept would be read by the next.
    What it returns is made `outputs.plain`. changes: filled with what the last run had rebound.
    """
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        snapshot = Snapshot(module)
        drawn = _random_states()
        with _buffers_unwatched():
            try:
                outputs = plain(original(*args, **kwargs))
            finally:
                changes[:] = snapshot.restore()
        for source, state in _random_states().items():
            if state != drawn.get(source, state):
                raise CaptureError(
                    f"forward draws random numbers from {source}, which a capture would burn in; "
                    "draw them with torch, or give them to forward as an argument"
                )
        return outputs

    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    previous = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if previous is not None:
            module.__dict__["forward"] = previous


def _random_states() -> dict[str, str]:
    """What the generators of Python and numpy will draw next, in a form that compares."""
    numpy = sys.modules.get("numpy")
    states = {"Python's random": repr(hash(random.getstate()))}
    if numpy is not None:
        states["numpy.random"] = repr(numpy.random.get_state())
    return states


@contextmanager
def _buffers_unwatched() -> Iterator[None]:
    """torch.export takes every buffer that forward sets for a result, and fails at those that were
    not there before; `check_forgets` decides. Buffers written to in place it finds by itself."""
    hooks = module_hooks._global_buffer_registration_hooks
    watching = dict(hooks)
    hooks.clear()
    try:
        yield
    finally:
        hooks.update(watching)


def check_forgets(module: nn.Module, call: Mapping[str, Any], changes: Sequence[Change]) -> None:
    """Refuse a model that computes something else because of what an earlier call kept.

    changes: what a run of forward rebinds. Where one of them could matter, the model is run on
    other values than those of `call`, afresh and after a run on `call`: the results must agree, and
    no number may have gone on counting. Raises CaptureError, also for a model without data (on the
    meta device).
    """
    kept = [change for change in changes if change.is_state]
    if not kept:
        return
    names = ", ".join(dict.fromkeys(change.path for change in kept))
    if any(t.device.type == "meta" for t in (*module.parameters(), *module.buffers())):
        raise CaptureError(
            f"forward sets {names}, and whether a later call depends on it cannot be tried on a "
            "model without data; load the weights, or make it before capture"
        )
    snapshot = Snapshot(module, with_contents=True)

    def run(*calls: Mapping[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
        """Outputs of the last call, and what all of them left behind."""
        try:
            with torch.no_grad():
                outputs = [_tensors(plain(module(**values))) for values in calls][-1]
        finally:
            left = {change.path: change.after for change in snapshot.restore()}
        return outputs, left

    other = {name: _other_values(value) for name, value in call.items()}
    try:
        fresh, once = run(other)
    except Exception:
        # Values that the model does not take; what is wrong with `call` itself, capture has told.
        other = dict(call)
        fresh, once = run(other)
    again, twice = run(call, other)
    counted = [
        path
        for path, value in once.items()
        if isinstance(value, (int, float)) and value != twice.get(path, value)
    ]
    is_same = len(fresh) == len(again) and all(map(_equal, fresh, again))
    if not is_same or counted:
        how = "goes on from it" if is_same else "computes something else"
        raise CaptureError(
            f"the model changes its state: forward sets {', '.join(counted) or names}, and {how} "
            "the next time; graphopt captures pure forwards: take the state as an argument and "
            "return it"
        )


def _other_values(value: Any) -> Any:
    """Other values of the same kind: floats at random, integers and bools from other places."""
    if not isinstance(value, Tensor) or value.numel() == 0:
        return value
    if value.is_floating_point():
        return torch.randn_like(value)
    flipped = value.flip(list(range(value.ndim)))
    is_new = not torch.equal(flipped, value)
    return flipped if is_new else torch.zeros_like(value)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf.clone() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _equal(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.allclose(first, second, rtol=1e-5, atol=1e-6, equal_nan=True)
