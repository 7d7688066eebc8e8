"""BlockPool against a reference model."""

from __future__ import annotations

import copy
import random
from collections import Counter
from typing import Any

import pytest

from graphopt.errors import CapacityError
from graphopt.runtime.blocks import BlockPool


def state(pool: BlockPool) -> Any:
    return copy.deepcopy(vars(pool))


def test_block_zero_is_never_handed_out() -> None:
    pool = BlockPool(5, 4)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert (pool.num_free, pool.num_used, pool.num_total) == (0, 4, 4)


@pytest.mark.parametrize(("blocks", "size"), [(1, 4), (0, 4), (5, 0)])
def test_pool_without_room_is_refused(blocks: int, size: int) -> None:
    with pytest.raises(CapacityError, match="at least 2 blocks"):
        BlockPool(blocks, size)


def test_blocks_for() -> None:
    pool = BlockPool(9, 4)
    assert [pool.blocks_for(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


def test_too_few_blocks_changes_nothing() -> None:
    pool = BlockPool(5, 4)
    pool.allocate(2)
    before = state(pool)
    with pytest.raises(CapacityError, match="3 blocks wanted, 2 free"):
        pool.allocate(3)
    assert state(pool) == before


@pytest.mark.parametrize("wrong", ["again", "twice at once", "null", "unknown", "never given"])
def test_bad_free_raises_and_changes_nothing(wrong: str) -> None:
    pool = BlockPool(6, 4)
    a, b, c = pool.allocate(3)
    pool.free([b])
    bad = {
        "again": [a, b],
        "twice at once": [a, c, c],
        "null": [a, 0],
        "unknown": [a, 99],
        "never given": [a, 5],
    }[wrong]
    before = state(pool)
    with pytest.raises(RuntimeError, match="not in use"):
        pool.free(bad)
    assert state(pool) == before
    pool.check()


def test_sharing_an_unused_block_raises() -> None:
    pool = BlockPool(4, 4)
    for block in (0, 1, 9):
        with pytest.raises(RuntimeError, match=f"block {block} is not in use"):
            pool.share(block)


def test_random_operations_keep_every_block() -> None:
    rng = random.Random()
    for _ in range(20):
        pool = BlockPool(rng.randint(2, 12), rng.randint(1, 4))
        held: Counter[int] = Counter()
        for _ in range(500):
            action = rng.random()
            if action < 0.4:
                count = rng.randint(0, 4)
                if count <= pool.num_total - len(held):
                    blocks = pool.allocate(count)
                    assert not set(blocks) & set(held)
                    assert len(set(blocks)) == count
                    held.update(blocks)
                else:
                    with pytest.raises(CapacityError):
                        pool.allocate(count)
            elif action < 0.6 and held:
                block = rng.choice(list(held))
                pool.share(block)
                held[block] += 1
            elif held:
                blocks = rng.sample(list(held.elements()), rng.randint(1, held.total()))
                pool.free(blocks)
                held -= Counter(blocks)
            pool.check()
            assert pool.num_used == len(held)
            assert pool.num_free == pool.num_total - len(held)
        pool.free(list(held.elements()))
        assert pool.num_free == pool.num_total


def test_a_pool_of_any_size_costs_nothing() -> None:
    pool = BlockPool(10**15, 16)
    assert pool.num_free == 10**15 - 1
    assert pool.allocate(2) == [1, 2]
    pool.free([1])
    pool.check()
    assert (pool.num_free, pool.num_used) == (10**15 - 2, 1)


@pytest.mark.parametrize("damage", ["lost", "doubled", "both", "unheld", "skipped", "too many"])
def test_check_notices_damage(damage: str) -> None:
    pool = BlockPool(6, 4)
    used = pool.allocate(3)
    pool.free([used.pop()])
    pool.check()
    if damage == "lost":
        pool._free.pop()
    elif damage == "doubled":
        pool._free.append(pool._free[0])
    elif damage == "both":
        pool._free.append(used[0])
    elif damage == "skipped":
        pool._fresh += 1
    elif damage == "too many":
        pool.num_blocks = 3
    else:
        pool._references[used[0]] = 0
    with pytest.raises(RuntimeError, match="inconsistent"):
        pool.check()
