"""graphopt::kv_write: store keys and values of the step's token rows in the paged cache.

Cache storage is `[blocks, block_size, G, D]`; `slots_T[t] = block * block_size + offset` says where
row t goes. Values are cast to the storage dtype.
"""

from __future__ import annotations

from torch import Tensor

from graphopt.ir.opset import Cost, define, nbytes
from graphopt.ops import operands

SCHEMA = (
    "kv_write(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k_BGTD, Tensor v_BGTE, "
    "Tensor slots_T) -> ()"
)


def reference(
    k_cache: Tensor, v_cache: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, slots_T: Tensor
) -> None:
    """Row t of batch item 0 goes to slot `slots_T[t]`."""
    for storage, rows_BGTD in ((k_cache, k_BGTD), (v_cache, v_BGTE)):
        rows_TGD = rows_BGTD[0].transpose(0, 1).to(storage.dtype)
        storage.flatten(0, 1).index_copy_(0, slots_T, rows_TGD)


def fake(k_cache: Tensor, v_cache: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, slots_T: Tensor) -> None:
    """Nothing is returned."""
    operands.floats(k_cache=k_cache, v_cache=v_cache, k_BGTD=k_BGTD, v_BGTE=v_BGTE)
    operands.integers(slots_T=slots_T)
    for name, rows, storage in (("k_BGTD", k_BGTD, k_cache), ("v_BGTE", v_BGTE, v_cache)):
        operands.rank(name[0] + "_cache", storage, 4)
        _blocks, _block_size, heads, width = storage.shape
        operands.sizes(name, rows, 1, heads, slots_T.shape[0], width)
    operands.rank("slots_T", slots_T, 1)


def cost(k_cache: Tensor, v_cache: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, slots_T: Tensor) -> Cost:
    """No arithmetic: each row is read and written once."""
    return Cost(0.0, 2.0 * nbytes(k_BGTD, v_BGTE))


SPEC = define(
    SCHEMA,
    reference=reference,
    fake=fake,
    cost=cost,
    step_inputs={"slots_T": "slots"},
)
