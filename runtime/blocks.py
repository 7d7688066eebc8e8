"""The pool of KV-cache blocks: who may write where. No torch, no policy.

Block 0 is never handed out: block tables are padded with it. Blocks are counted by reference, so
that a later prefix cache can share them. Free + used == total at all times, and an operation that
raises changes nothing.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from graphopt.errors import CapacityError


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, block 0 included."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """Raises CapacityError when there is no block to hand out."""
        if num_blocks < 2 or block_size < 1:
            raise CapacityError(
                f"a KV cache needs at least 2 blocks (one is reserved) of at least 1 token, "
                f"got {num_blocks} of {block_size}"
            )
        self.num_blocks, self.block_size = num_blocks, block_size
        # Blocks that were never used are counted, not listed: a large pool costs no memory.
        self._fresh = 1
        self._free: deque[int] = deque()
        self._references: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated."""
        return self.num_blocks - self._fresh + len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return len(self._references)

    @property
    def num_total(self) -> int:
        """Blocks that can ever be handed out."""
        return self.num_blocks - 1

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks, each with one holder. Raises CapacityError when too few are free."""
        if count > self.num_free:
            raise CapacityError(f"{count} blocks wanted, {self.num_free} free")
        fresh = min(count, self.num_blocks - self._fresh)
        blocks = list(range(self._fresh, self._fresh + fresh))
        self._fresh += fresh
        blocks += [self._free.popleft() for _ in range(count - fresh)]
        self._references.update(dict.fromkeys(blocks, 1))
        return blocks

    def share(self, block: int) -> None:
        """One more holder of a used block. Raises RuntimeError for a block nobody holds."""
        self._require(block, 1)
        self._references[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """One holder less for each; a block without holders can be allocated again.

        Raises RuntimeError for a block nobody holds (freed twice, or never handed out).
        """
        for block, count in Counter(blocks).items():
            self._require(block, count)
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] == 0:
                del self._references[block]
                self._free.append(block)

    def _require(self, block: int, holders: int) -> None:
        if self._references.get(block, 0) < holders:
            raise RuntimeError(f"block {block} is not in use (freed twice, or never handed out)")

    def check(self) -> None:
        """Raise RuntimeError with a dump when a block is lost, doubled or out of range."""
        free, used = set(self._free), set(self._references)
        whole = free | used == set(range(1, self._fresh)) and self._fresh <= self.num_blocks
        held = all(count > 0 for count in self._references.values())
        if free & used or len(free) != len(self._free) or not whole or not held:
            raise RuntimeError(
                f"block pool is inconsistent: free {list(self._free)}, used {self._references}"
            )
