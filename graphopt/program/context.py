"""How many tokens a model says it takes, and which limits of its capture fall short of that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from graphopt.ir.limits import Limit

_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "context_length",
    "block_size",
    "n_ctx",
)


def stated_context(config: Any, names: Sequence[str] = _NAMES) -> int | None:
    """The number of tokens in a model's configuration (an object or a dict), None without one."""
    is_dict = isinstance(config, Mapping)
    found = (config.get(name) if is_dict else getattr(config, name, None) for name in names)
    return next(
        (n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), None
    )


def narrowing(limits: Iterable[Limit], stated: int | None) -> list[Limit]:
    """The limits that a user did not ask for: of a branch, a size fixed by an op, or a size that
    ends below `stated`.

    A maximum at or above `stated` cuts nothing off.
    """
    return [limit for limit in limits if _is_narrowing(limit, stated)]


def _is_narrowing(limit: Limit, stated: int | None) -> bool:
    if limit.relation == "<=" and limit.size in limit.names and stated is not None:
        return limit.number < stated
    return limit.cause == "branch" or limit.relation == "=="
