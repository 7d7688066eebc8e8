"""The letters of shape suffixes (`q_BHSD`), defined once for the whole project.

B batch          S query tokens      T key/value tokens, or token rows of all requests
H query heads    G key/value heads   D head width            E value head width
K input columns  N output columns    L rows whose logits are wanted
R requests       M block-table columns                       V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from graphopt.ir.limits import Limit, fitting_size, lowest

# What a graph may compute in. Every backend takes them all: where the cpu backend has no kernel
# for one, torch runs the op.
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b1",
    torch.complex64: "c64",
    torch.complex128: "c128",
    torch.float8_e4m3fn: "f8e4m3",
    torch.float8_e5m2: "f8e5m2",
}
DTYPES_BY_NAME = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def told_dtypes() -> str:
    """All of them, for messages."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES)


# Distinct and far from 0 and 1, so that no guess about a size is true by accident.
_HINTS = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43)


class SymbolicInputs:
    """Makes fake inputs whose named axes are symbolic, for (re-)inferring shapes of a graph.

    One instance owns one ShapeEnv: two axes given the same name are the same symbol.
    limits: what the sizes keep to; ops that look at a size see one that is allowed.
    """

    def __init__(self) -> None:
        self.shape_env = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.shape_env, allow_non_fake_inputs=True)
        self.limits: tuple[Limit, ...] = ()
        self._symbols: dict[str, torch.SymInt] = {}

    def symbol(self, name: str) -> torch.SymInt:
        """The symbolic size called `name`, made on first use."""
        if name not in self._symbols:
            hint = _HINTS[len(self._symbols) % len(_HINTS)] + 42 * (
                len(self._symbols) // len(_HINTS)
            )
            low = lowest(self.limits, name)
            if low is not None:
                # At its least a size may look like a number that an op knows.
                hint = max(hint, low.number + low.number // 2 + 1)
            hint = fitting_size(self.limits, name, hint)
            probe = self.mode.from_tensor(
                torch.empty(hint, device="meta"),
                static_shapes=False,
                symbolic_context=StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC]),
            )
            self._symbols[name] = cast(torch.SymInt, probe.shape[0])
        return self._symbols[name]

    @property
    def names(self) -> dict[str, str]:
        """Expression text of each symbol (`s0`) -> the name it was asked for by."""
        return {str(symbol): name for name, symbol in self._symbols.items()}

    def tensor(
        self, shape: Sequence[int | str], dtype: torch.dtype, device: str = "cpu"
    ) -> FakeTensor:
        """A fake tensor; string entries of `shape` are symbolic axes."""
        sizes = [self.symbol(size) if isinstance(size, str) else size for size in shape]
        with self.mode:
            fake = torch.empty(sizes, dtype=dtype, device=device)
        assert isinstance(fake, FakeTensor)
        return fake

    def constant(self, tensor: torch.Tensor) -> FakeTensor:
        """A fake stand-in for a weight: real sizes, no data."""
        with self.mode:
            fake = torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="cpu")
        assert isinstance(fake, FakeTensor)
        return fake
