"""The pool of KV-cache blocks: who may write where. No torch, no policy.

Block 0 is never handed out: block tables are padded with it. Blocks are counted by reference, so
that a later prefix cache can share them. `free + used == total` at all times.
"""

from __future__ import annotations

from collections import deque

from graphopt.errors import CapacityError


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, block 0 included."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """Raises CapacityError when there is no block to hand out."""
        if num_blocks < 2 or block_size < 1:
            raise CapacityError(
                f"a KV cache needs at least 2 blocks of 1 token, got {num_blocks} of {block_size}"
            )
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free: deque[int] = deque(range(1, num_blocks))
        self._references: dict[int, int] = {}

    @property
    def free(self) -> int:
        """Blocks that can be allocated."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return len(self._references)

    @property
    def total(self) -> int:
        """Blocks that can ever be handed out."""
        return self.num_blocks - 1

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks, each with one reference. Raises CapacityError when too few are free."""
        if count > self.free:
            raise CapacityError(f"{count} blocks wanted, {self.free} free")
        blocks = [self._free.popleft() for _ in range(count)]
        self._references.update(dict.fromkeys(blocks, 1))
        return blocks

    def share(self, block: int) -> None:
        """One more holder of a used block."""
        self._references[self._held(block)] += 1

    def release(self, blocks: list[int]) -> None:
        """One holder less for each; a block without holders is free. Raises RuntimeError for a
        block nobody holds (freed twice, or never handed out)."""
        for block in blocks:
            self._references[self._held(block)] -= 1
            if self._references[block] == 0:
                del self._references[block]
                self._free.append(block)

    def _held(self, block: int) -> int:
        if block not in self._references:
            raise RuntimeError(f"block {block} is not in use (freed twice?)")
        return block

    def check(self) -> None:
        """Raise RuntimeError with a dump when a block is lost, doubled or out of range."""
        free, used = set(self._free), set(self._references)
        whole = free | used == set(range(1, self.num_blocks))
        if free & used or len(free) != len(self._free) or not whole:
            raise RuntimeError(f"block pool is inconsistent: free {free}, used {used}")
