"""A tiny deterministic "language model" that sees its context only through the paged cache.

Every step writes (position, token) of its rows into their slots and reads the whole context back
through block table and length. Logits are a hash of what was read, so any wrong block, slot,
position, length or order changes the tokens, and an unwritten or stale entry raises.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

POISON = -7
VOCABULARY = 97


class StepError(Exception):
    """The executable failed half way, after writing to the cache."""


@dataclass
class FakeCache:
    """Positions and tokens per slot, POISON where nothing was written."""

    positions: np.ndarray
    tokens: np.ndarray
    block_size: int

    @property
    def nbytes(self) -> int:
        return self.positions.nbytes + self.tokens.nbytes


def logits_of(context: Sequence[int], vocabulary: int = VOCABULARY) -> np.ndarray:
    """Logits after a context: the oracle, which needs no cache."""
    digest = hashlib.blake2b(np.asarray(context, np.int64).tobytes(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).normal(0, 2, vocabulary)


def greedy(prompt: Sequence[int], count: int, vocabulary: int = VOCABULARY) -> list[int]:
    """Greedy continuation by the oracle."""
    context = list(prompt)
    for _ in range(count):
        context.append(int(logits_of(context, vocabulary).argmax()))
    return context[len(prompt) :]


class FakeExecutable:
    """Satisfies ServingExecutable, and asserts its input contract."""

    cache_bytes_per_token = 16

    def __init__(self, max_context: int | None = None, vocab_size: int = VOCABULARY) -> None:
        self.max_context, self.vocab_size = max_context, vocab_size
        self.row_counts: list[int] = []
        self.fail_at: set[int] = set()
        self.poison_logits_at: dict[int, float] = {}
        self.calls = 0

    def new_cache(self, num_blocks: int, block_size: int) -> FakeCache:
        shape = num_blocks * block_size
        return FakeCache(np.full(shape, POISON), np.full(shape, POISON), block_size)

    def __call__(
        self,
        cache: FakeCache,
        *,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        query_start: Tensor,
        kv_lens: Tensor,
        block_tables: Tensor,
        logit_rows: Tensor,
    ) -> Tensor:
        given = (tokens, positions, slots, query_start, kv_lens, block_tables, logit_rows)
        for tensor in given:
            assert tensor.dtype == torch.int64
            assert tensor.device.type == "cpu"
            assert tensor.is_contiguous()
        rows, requests = tokens.shape[0], kv_lens.shape[0]
        assert rows > 0
        assert tokens.shape == positions.shape == slots.shape == (rows,)
        assert query_start.shape == (requests + 1,)
        assert query_start[0] == 0
        assert query_start[-1] == rows
        assert block_tables.shape[0] == requests
        assert len(set(slots.tolist())) == rows
        # Block 0 is padding.
        assert int(slots.min()) >= cache.block_size
        call, self.calls = self.calls, self.calls + 1
        self.row_counts.append(rows)
        cache.positions[slots.numpy()] = positions.numpy()
        cache.tokens[slots.numpy()] = tokens.numpy()
        if call in self.fail_at:
            raise StepError(f"step {call} broke")
        contexts: dict[int, list[int]] = {}
        for request in range(requests):
            first, last = query_start[request : request + 2].tolist()
            length = int(kv_lens[request])
            assert last > first
            assert positions[first:last].tolist() == list(range(length - (last - first), length))
            place = np.arange(length)
            table = block_tables[request].numpy()
            read = table[place // cache.block_size] * cache.block_size + place % cache.block_size
            assert cache.positions[read].tolist() == place.tolist(), "stale or unwritten entry"
            context = cache.tokens[read].tolist()
            for row in range(first, last):
                contexts[row] = context[: int(positions[row]) + 1]
        logits = [logits_of(contexts[row], self.vocab_size) for row in logit_rows.tolist()]
        assert logits
        result = torch.tensor(np.array(logits))
        if call in self.poison_logits_at:
            result[-1, 3] = self.poison_logits_at[call]
        return result


class ByteTokenizer:
    """Token = byte; 256 and above are special tokens. Like Hugging Face's, as far as is used."""

    def __init__(self) -> None:
        self.decoded = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(
        self,
        token_ids: Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = True,
    ) -> str:
        self.decoded += len(token_ids)
        assert skip_special_tokens
        assert not clean_up_tokenization_spaces
        return bytes(t for t in token_ids if t < 256).decode("utf-8", errors="replace")


class ScriptedExecutable(FakeExecutable):
    """Says the given tokens whatever was asked, by position after a prompt of `start` tokens."""

    def __init__(self, script: Sequence[int], start: int, vocab_size: int = 260) -> None:
        super().__init__(vocab_size=vocab_size)
        self.script, self.start = list(script), start

    def __call__(self, cache: FakeCache, **step: Tensor) -> Tensor:
        super().__call__(cache, **step)
        logits = torch.zeros(len(step["logit_rows"]), self.vocab_size)
        for row, source in enumerate(step["logit_rows"].tolist()):
            said = int(step["positions"][source]) + 1 - self.start
            logits[row, self.script[said]] = 9.0
        return logits
