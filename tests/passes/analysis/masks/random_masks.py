"""Random calls of any op, drawn by its schema, so that an op that a table gains is drawn too."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from mask_graphs import MaskGraph
from torch import Tensor, fx

from graphopt.passes.analysis.masks.values import kind

aten = torch.ops.aten
DTYPES = (torch.bool, torch.int64, torch.int32, torch.float32, torch.float64)
# Few bits, so that float32 and float64 compute the same.
NUMBERS = (True, False, 0, 1, 2, 3, -1, -2, 0.0, 0.5, 1.0, -2.5, 4.0, -1e4, math.inf, -math.inf)
KINDS = ("bool", "int", "float")
_TRIES = 200
_LARGEST = 400


class RandomMasks(MaskGraph):
    """Tensors over `[3, 4]` and the like: positions, conditions, numbers, data; and what drawn
    calls make of them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self._kinds: tuple[str, ...] = KINDS
        made = torch.Generator().manual_seed(seed)
        j = self.call(aten.arange.default, 4)
        i = self.call(aten.unsqueeze.default, self.call(aten.arange.default, 3), 1)
        causal = self.call(aten.le.Tensor, j, i)
        self.pool = [
            j,
            i,
            causal,
            self.call(aten.where.Scalar, causal, 0.0, -math.inf),
            self.call(aten.full.default, [], self.random.choice((2, 0.5, -1))),
            self.call(aten.sub.Tensor, i, j),
            self.input("bits", torch.randint(0, 2, (3, 4), generator=made)),
            self.input("data", torch.randint(-8, 8, (3, 4), generator=made) / 4),
            self.call(aten.view.default, causal, [1, 3, 1, 4]),
            self.call(aten.gt.Scalar, j, 1),
            self.call(aten.remainder.Scalar, self.call(aten.add.Tensor, i, j), 3),
            self.call(aten.eq.Tensor, i, j),
            self.call(aten.full.default, [3, 4], 2),
            self.call(aten.full.default, [3, 4], -1.0),
            self.call(aten.ones.default, [3, 4]),
            self.call(aten.full.default, [], -0.5),
            self.call(aten.full.default, [], -math.inf),
            self.call(aten.full.default, [], 3),
        ]

    def draw(self, op: Any) -> fx.Node | None:
        """One call of `op` on what is there, kept for later calls; None when none was found that
        torch takes."""
        for _ in range(_TRIES):
            # Operands of one kind, as most ops want them, or of any.
            self._kinds = self.random.choice((*((kind,) for kind in KINDS), KINDS))
            args, kwargs = self._arguments(op)
            real, named = fx.node.map_arg((args, kwargs), self.values.__getitem__)
            try:
                value = op(*real, **named)
            except (RuntimeError, IndexError, TypeError, ValueError):
                continue
            if not isinstance(value, Tensor) or not 0 < value.numel() <= _LARGEST or value.ndim > 4:
                continue
            if value.is_complex() or value.dtype in (torch.int8, torch.uint8, torch.int16):
                continue
            if value.numel() and (value.double().nan_to_num(0, 0, 0).abs() > 1e6).any():
                continue
            try:
                node = self.call(op, *args, **kwargs)
            except RuntimeError:
                # What shape inference alone refuses.
                continue
            self.pool.append(node)
            return node
        return None

    def _arguments(self, op: Any) -> tuple[list[Any], dict[str, Any]]:
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        is_short = False
        for spec in op._schema.arguments:
            has_default = spec.has_default_value()
            is_short = is_short or (has_default and self.random.random() < 0.4)
            if is_short and has_default:
                continue
            value = self._value(str(spec.type), spec.name, args)
            if spec.kwarg_only or is_short:
                kwargs[spec.name] = value
            else:
                args.append(value)
        return args, kwargs

    def _value(self, spelled: str, name: str, args: list[Any]) -> Any:
        pick, number = self.random.choice, self.random.randint
        if name in ("memory_format", "layout", "pin_memory", "generator"):
            # torch believes any number here, and crashes.
            return None
        is_optional = spelled.startswith("Optional[")
        if is_optional and spelled != "Optional[Scalar]" and self.random.random() < 0.4:
            return None
        wanted = spelled.removeprefix("Optional[").removesuffix("]") if is_optional else spelled
        operand = next((a for a in args if isinstance(a, fx.Node)), None)
        shape = list(self.values[operand].shape) if operand is not None else [3, 4]
        if wanted == "Tensor":
            # A number takes the place of a second tensor, as in exported graphs.
            is_first = operand is None or self.random.random() < 0.7
            return pick(self._tensors_of_kind()) if is_first else self._number()
        if wanted.startswith("List[Tensor") or wanted.startswith("List[Optional[Tensor"):
            return self._tensors(shape if operand is not None else None)
        if wanted in ("Scalar", "number"):
            return self._number()
        if wanted == "float":
            return pick((0.0, 0.5))
        if wanted == "bool":
            return pick((False, True))
        if wanted == "str":
            return pick(("floor", "trunc"))
        if wanted == "int" and name == "dtype":
            return pick(DTYPES)
        if wanted == "Device":
            return "cpu"
        if wanted in ("int", "SymInt"):
            if name in ("repeats", "n", "step"):
                return number(1, 3)
            return number(-len(shape) - 1, len(shape)) if "dim" in name else number(-4, 6)
        if wanted.startswith(("List[int", "List[SymInt")):
            return self._list(name, shape)
        return None

    def _tensors_of_kind(self) -> list[fx.Node]:
        return [x for x in self.pool if kind(self.values[x].dtype) in self._kinds]

    def _number(self) -> bool | float:
        names = {bool: "bool", int: "int", float: "float"}
        return self.random.choice([n for n in NUMBERS if names[type(n)] in self._kinds])

    def _tensors(self, shape: list[int] | None) -> list[Any]:
        if shape is None:
            found = self._tensors_of_kind()
            return [self.random.choice(found) for _ in range(self.random.randint(1, 3))]
        indices = [x for x in self.pool if self.values[x].dtype == torch.int64]
        found = [self.random.choice([None, *indices]) for _ in shape]
        return found if any(x is not None for x in found) else [self.random.choice(indices)]

    def _list(self, name: str, shape: list[int]) -> list[int]:
        pick, number = self.random.choice, self.random.randint
        rank = len(shape)
        how = number(0, 3)
        if name in ("dims", "dim"):
            order = self.random.sample(range(rank), rank)
            return order if how or rank < 2 else order[: number(1, rank)]
        if how == 0:
            return [number(1, 3) for _ in range(max(rank, 1))]
        if how == 1:
            return [pick((1, 2)), *shape]
        if how == 2:
            return [pick((size, -1, 3 if size == 1 else size)) for size in shape]
        total, sizes = math.prod(shape), []
        while total > 1 and len(sizes) < 3:
            size = pick([n for n in range(2, total + 1) if total % n == 0])
            sizes.append(size)
            total //= size
        return [*sizes, total] if total > 1 or pick((True, False)) else sizes or [1]
