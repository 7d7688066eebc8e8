"""Random small modules, odd examples and odd options: the program answers as eager does, or the
refusal is typed.

A module is a chain of random operations, over random dtypes and sizes, with weights that may be
shared, sliced, frozen or unused, hooks, and outputs in random containers. One in five examples and
options is odd on purpose.
"""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphopt
from graphopt.errors import BackendError, GraphoptError, RequestError

from .harness import WrongError

Step = Callable[["Chain", Tensor], Any]
_DTYPES = (
    *(torch.float32,) * 6,
    *(torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.int32),
    *(torch.bool, torch.uint8, torch.int8, torch.complex128, torch.uint16, torch.float8_e4m3fn),
)
_JUMPS = {
    "sort", "topk", "argmax", "floor divide", "compare", "where", "mask", "cast int", "view as",
    "embedding", "branch on data", "max", "power", "divide", "exp",
}  # fmt: skip
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 5e-2, torch.float64: 1e-9}


def _in_place(chain: Chain, x: Tensor) -> Tensor:
    y = x.clone()
    y[..., :1] = 3
    return y


def _unbound(chain: Chain, x: Tensor) -> Tensor:
    first, *others = x.unbind(-1)
    return torch.stack([first, *others], -1)


def _normed(chain: Chain, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * chain.gain


def _attends(chain: Chain, x: Tensor) -> Tensor:
    q = x.reshape(x.shape[0], 1, -1, x.shape[-1])
    return F.scaled_dot_product_attention(q, q, q, is_causal=True).reshape(x.shape)


STEPS: dict[str, Step] = {
    "relu": lambda m, x: torch.relu(x),
    "gelu": lambda m, x: F.gelu(x),
    "silu gate": lambda m, x: F.silu(x) * x,
    "exp": lambda m, x: torch.exp(-x.abs()),
    "softmax": lambda m, x: torch.softmax(x, -1),
    "cumsum": lambda m, x: x.cumsum(-1),
    "sort": lambda m, x: x.sort(-1)[0],
    "topk": lambda m, x: x.topk(2, -1)[0],
    "argmax": lambda m, x: x.argmax(-1),
    "add": lambda m, x: x + 1,
    "floor divide": lambda m, x: x // 2,
    "divide": lambda m, x: x / 3,
    "power": lambda m, x: x**2,
    "negate": lambda m, x: -x,
    "compare": lambda m, x: x > 0,
    "where": lambda m, x: torch.where(x > 0, x, x * 2),
    "mask": lambda m, x: x.masked_fill(x > 1, 0),
    "cast down": lambda m, x: x.to(torch.bfloat16),
    "cast up": lambda m, x: x.to(torch.float64),
    "cast int": lambda m, x: x.to(torch.int64),
    "cast float": lambda m, x: x.float(),
    "view as": lambda m, x: x.view(torch.int32),
    "transpose": lambda m, x: x.transpose(-1, -2),
    "flatten": lambda m, x: x.flatten(),
    "reshape": lambda m, x: x.reshape(x.shape[0], -1),
    "unsqueeze": lambda m, x: x.unsqueeze(1),
    "squeeze": lambda m, x: x.squeeze(),
    "slice": lambda m, x: x[..., 1:],
    "slice far": lambda m, x: x[..., -100:100:2],
    "roll": lambda m, x: x.roll(1, -1),
    "flip": lambda m, x: x.flip(-1),
    "pad": lambda m, x: F.pad(x, (1, 1)),
    "cat": lambda m, x: torch.cat([x, x], -1),
    "stack": lambda m, x: torch.stack([x, x], 0),
    "chunk": lambda m, x: x.chunk(2, -1)[0],
    "split": lambda m, x: sum(x.split(1, -1)),
    "unbind": _unbound,
    "expand": lambda m, x: x.unsqueeze(0).expand(3, *x.shape),
    "repeat": lambda m, x: x.repeat_interleave(2, -1),
    "mean": lambda m, x: x.mean(-1, keepdim=True),
    "sum": lambda m, x: x.sum(0),
    "max": lambda m, x: x.max(-1)[0],
    "norm": lambda m, x: F.layer_norm(x, x.shape[-1:]),
    "rms norm": _normed,
    "linear": lambda m, x: F.linear(x, m.weight, m.bias),
    "linear of a slice": lambda m, x: F.linear(x, m.weight[:3]),
    "tied": lambda m, x: x @ m.tied.t(),
    "times a buffer": lambda m, x: x * m.buffer,
    "constant": lambda m, x: x + torch.arange(x.shape[-1]),
    "plain attribute": lambda m, x: x + m.plain,
    "embedding": lambda m, x: F.embedding(x.long().abs() % 4, m.weight),
    "attention": _attends,
    "in place": _in_place,
    "einsum": lambda m, x: torch.einsum("...d,ed->...e", x, m.weight),
    "conv": lambda m, x: F.conv1d(x.reshape(1, 1, -1), torch.ones(1, 1, 2, dtype=x.dtype)),
    "complex": lambda m, x: torch.view_as_real(torch.view_as_complex(x.reshape(-1, 2))),
    "polar": lambda m, x: torch.polar(x.abs(), x).real,
    "fft": lambda m, x: torch.fft.rfft(x).real,
    "conjugate": lambda m, x: x.conj(),
    "dropout off": lambda m, x: F.dropout(x, 0.5, m.training),
    "dropout on": lambda m, x: F.dropout(x, 0.5, True),
    "random": lambda m, x: x + torch.rand_like(x),
    "item": lambda m, x: x * float(x.sum()),
    "branch": lambda m, x: x * 2 if x.shape[0] > 2 else x,
    "branch on data": lambda m, x: x * 2 if x.sum() > 0 else x,
    "nonzero": lambda m, x: x[x > 0],
    "sized": lambda m, x: x * x.shape[0],
    "counts": lambda m, x: m.count(x),
    "nothing": lambda m, x: x,
    "contiguous": lambda m, x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "as strided": lambda m, x: x.as_strided((2, 2), (1, 1)),
    "to device": lambda m, x: x.to("cpu").cpu(),
    "numpy": lambda m, x: torch.from_numpy(x.numpy()),
    "list": lambda m, x: torch.tensor([1.0, 2.0]).sum() + x,
    "checked": lambda m, x: m.checked(x),
    "quits": lambda m, x: m.quit(x),
    "second": lambda m, x: x if m.second is None else x + m.second,
}
PACKS: dict[str, Callable[[Tensor], Any]] = {
    "plain": lambda y: y,
    "tuple": lambda y: (y, y * 2),
    "dict": lambda y: {"b": y, "a": y + 1},
    "nested": lambda y: [y, (y, {"k": y})],
    "none": lambda y: (y, None),
    "number": lambda y: (y, 3),
    "twice": lambda y: (y, y),
    "text": lambda y: (y, "text"),
    "size": lambda y: (y, y.shape[0]),
}


class Chain(nn.Module):
    """Random steps one after the other, then a container of random form."""

    def __init__(self, numbers: random.Random, steps: list[str], pack: str) -> None:
        super().__init__()
        kind = numbers.choice((torch.float32,) * 5 + (torch.float64, torch.float16, torch.bfloat16))
        width = numbers.choice((4, 4, 4, 4, 1, 0))
        self.weight = nn.Parameter(torch.randn(4, width, dtype=kind))
        self.bias = nn.Parameter(torch.randn(4, dtype=kind), requires_grad=False)
        self.gain = nn.Parameter(torch.randn(4, dtype=kind))
        self.tied = numbers.choice((self.weight, nn.Parameter(self.weight.detach()[:2])))
        self.register_buffer("buffer", torch.randn(4).to(numbers.choice(_DTYPES)))
        self.register_buffer("unused", torch.ones(2), persistent=False)
        self.plain = torch.ones(1, dtype=kind)
        self.names, self.pack, self.second, self.calls = steps, pack, None, 0
        if numbers.random() < 0.1:
            self.register_forward_hook(lambda module, given, output: output)
        if numbers.random() < 0.05:
            self.register_forward_pre_hook(lambda module, given: None)
        if numbers.random() < 0.05:
            self.weight = nn.Parameter(self.weight.detach().t().contiguous().t())
        if numbers.random() < 0.03:
            self.buffer = self.buffer.to("meta")

    def keep_what_runs(self, x: Any) -> None:
        """Leave out the steps that eager refuses, so that most chains get to their end."""
        self.eval()
        kept: list[str] = []
        for name in self.names:
            with contextlib.suppress(Exception, SystemExit), torch.no_grad():
                x = STEPS[name](self, x)
                kept.append(name)
        self.names, self.calls = kept, 0

    def forward(self, x: Any, second: Any = None, *rest: Any, **more: Any) -> Any:
        self.second = second if isinstance(second, Tensor) else None
        try:
            for name in self.names:
                x = STEPS[name](self, x)
        finally:
            self.second = None
        return PACKS[self.pack](x)

    def count(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls

    def checked(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[0] < 1000, "too long")
        return x

    def quit(self, x: Tensor) -> Tensor:
        raise SystemExit("enough")


def _made(numbers: random.Random, dtype: torch.dtype, sizes: list[int]) -> Tensor:
    seed = torch.Generator().manual_seed(numbers.randrange(2**31))
    return (torch.randn(sizes, generator=seed) * 2).to(dtype)


def _odd_example(numbers: random.Random, x: Tensor) -> Any:
    choices: list[Callable[[], Any]] = [
        lambda: 3, lambda: "x", lambda: None, lambda: [], lambda: {}, lambda: [[x]], lambda: {x},
        lambda: {"x": x, "y": x}, lambda: {3: x}, lambda: [x, 3], lambda: [x, "a", None, 2.5],
        lambda: [x, [x, x]], lambda: {"x": x, "second": {"a": x}}, lambda: x.to("meta"),
        lambda: x.to_sparse(), lambda: x.requires_grad_(x.is_floating_point()), lambda: x.t(),
        lambda: x.as_subclass(_Own), lambda: x.numpy(), lambda: [x] * 5, lambda: x.tolist(),
        lambda: torch.nested.nested_tensor([x[0], x[0]]), lambda: object(), lambda: x[:0],
        lambda: x[:1], lambda: x.expand(2, *x.shape), lambda: {"x": x, "second": x[:0]},
    ]  # fmt: skip
    try:
        return numbers.choice(choices)()
    # Not every tensor has each of these forms.
    except (TypeError, RuntimeError, IndexError):
        return [x]


class _Own(Tensor):
    """A subclass without rules of its own."""


_ODD_OPTIONS: tuple[dict[str, Any], ...] = (
    {"dynamic": 3}, {"dynamic": {"x": 3}}, {"dynamic": {"x": {9: "a"}}}, {"dynamic": {"y": {}}},
    {"dynamic": {"x": {0: "a b"}}}, {"dynamic": {"x": {0: "b", 1: "b"}}}, {"backend": "gpu"},
    {"backend": None}, {"activations": "int4"}, {"kv_dtype": 3}, {"serving": "required"},
    {"serving": True}, {"passes": []}, {"passes": ["fuse_norm"]}, {"passes": "fuse_norm"},
    {"passes": [3]}, {"enable": ["merge_qkv"]}, {"enable": None}, {"disable": ["nothing"]},
    {"limits": {"fuse_norm": 0}}, {"limits": {"fuse_norm": -1}}, {"limits": [1]},
    {"expect": {"fuse_norm": 7}}, {"expect": 3}, {"instruments": [1]}, {"instruments": None},
    {"check": "numerics"}, {"check": "all"}, {"check": "numerics", "check_inputs": [3]},
    {"edit": {"dead_code": lambda text: text}}, {"edit": {"dead_code": lambda text: 3}},
    {"edit": {"dead_code": lambda text: "gir 1"}}, {"edit": 3}, {"threads": 1}, {"threads": 0},
    {"threads": "1"}, {"dump": 3}, {"dump": "a\0b"}, {"dump": b"x"}, {"dump": "/proc/no/such"},
)  # fmt: skip


class Compiles:
    """One random module, compiled, called twice, and now and then saved and loaded."""

    ci_count = 25

    def __init__(self, folder: Path) -> None:
        del folder
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        # What the first compilation imports is no part of the time of a case.
        graphopt.compile(nn.Linear(2, 2).eval(), torch.ones(2, 2), backend="reference")

    def run(self, numbers: random.Random, folder: Path) -> int:
        torch.manual_seed(numbers.randrange(2**31))
        ranks = numbers.choice((2, 2, 2, 3, 1, 4, 0))
        sizes = [numbers.choice((2, 3, 4, 5)) for _ in range(max(0, ranks - 1))]
        sizes += [4] * (ranks > 0)
        if ranks and numbers.random() < 0.05:
            sizes[numbers.randrange(ranks)] = numbers.choice((0, 1))
        x = _made(numbers, numbers.choice(_DTYPES), sizes)
        steps = numbers.choices(list(STEPS), k=numbers.randrange(1, 6))
        pack = numbers.choice(("plain",) * 12 + tuple(PACKS))
        model = Chain(numbers, steps, pack)
        if numbers.random() < 0.8:
            model.keep_what_runs(x)
        model.train(numbers.random() < 0.02)
        options: dict[str, Any] = {"backend": numbers.choice(("cpu", "reference"))}
        options["dynamic"] = numbers.choice((True, False, False))
        example: Any = numbers.choice((x, [x], {"x": x}, [x, x]))
        if numbers.random() < 0.1:
            example = _odd_example(numbers, x)
        if numbers.random() < 0.15:
            options |= numbers.choice(_ODD_OPTIONS)
        told = f"{model.names} {pack} {x.dtype} {list(x.shape)} {type(example).__name__} {options}"
        (folder / "case.txt").write_text(told)
        program = graphopt.compile(model, example, **options)
        if numbers.random() < 0.3:
            program.save(folder / "program")
            program = graphopt.load_program(folder / "program")
        given, named = _call(example)
        exactness = _exactness(model, example, model.names)
        for _ in range(2):
            _compare(model, program, given, named, exactness)
            given = [_again(numbers, value) for value in given]
            named = {name: _again(numbers, value) for name, value in named.items()}
        return 1


def _call(example: Any) -> tuple[list[Any], dict[str, Any]]:
    if isinstance(example, dict):
        return [], dict(example)
    return (list(example) if isinstance(example, (list, tuple)) else [example]), {}


def _again(numbers: random.Random, value: Any) -> Any:
    """Other values of the same type."""
    if not isinstance(value, Tensor) or type(value) is not Tensor:
        return value
    return _made(numbers, value.dtype, list(value.shape))


def _exactness(model: nn.Module, example: Any, steps: list[str]) -> float:
    """How near to eager, relative to the largest value; infinite where rounding alone may change
    everything, by a step that jumps. A fused op rounds once where eager rounds at each step."""
    leaves = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
    dtypes = {tensor.dtype for tensor in (*leaves, *model.parameters(), *model.buffers())}
    dtypes |= {torch.bfloat16} if "cast down" in steps else set()
    coarse = max((_TOLERANCE.get(dtype, 1e-4) for dtype in dtypes), default=1e-4)
    return math.inf if coarse > 1e-3 and _JUMPS & set(steps) else coarse


def _compare(
    model: nn.Module, program: Any, given: list[Any], named: dict[str, Any], exactness: float
) -> None:
    tensors = [value for value in given if isinstance(value, Tensor)]
    named_tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    with torch.no_grad():
        try:
            expected: Any = model(*given, **named)
        except Exception as error:
            expected = error
        try:
            found = program(*tensors, **named_tensors)
        except (RequestError, BackendError) as error:
            _allowed(error, expected)
            raise
    if isinstance(expected, Exception):
        # Eager fails as the program did not: an op of less demand took its place.
        return
    leaves = [leaf for leaf in pytree.tree_leaves(expected) if isinstance(leaf, Tensor)]
    results = list(found) if isinstance(found, tuple) else [found]
    if len(leaves) != len(results):
        raise WrongError(f"{len(results)} results, eager has {len(leaves)}")
    for ours, theirs in zip(results, leaves, strict=True):
        _same(ours, theirs, exactness)


def _allowed(error: GraphoptError, expected: Any) -> None:
    """A call like the example may be refused for what its values are, never for what it is."""
    told = str(error)
    is_fine = isinstance(expected, Exception) or "non-empty" in told or "0.." in told
    if not is_fine:
        raise WrongError(f"eager answers, the program refuses: {told}") from error


def _same(ours: Tensor, theirs: Tensor, exactness: float) -> None:
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        raise WrongError(f"{ours.dtype} {ours.shape}, eager {theirs.dtype} {theirs.shape}")
    wide = torch.complex128 if theirs.is_complex() else torch.float64
    a, b = ours.detach().to(wide), theirs.detach().to(wide)
    finite = b[b.isfinite()].abs()
    tolerance = exactness * max(1.0, float(finite.max()) if finite.numel() else 1.0)
    if not torch.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True):
        raise WrongError(f"{ours}\neager {theirs}")


FUZZER = Compiles
