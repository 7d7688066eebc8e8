import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q

from graphopt.errors import UnsupportedError
from graphopt.ir.weights import unpack_codes
from graphopt.models.gguf.blocks import PACKABLE, pack_blocks, take_rows, unpack_blocks

TYPES = [pytest.param(type_, id=type_.name) for type_ in PACKABLE]


def random_blocks(type_: Q, rows: int, columns: int) -> np.ndarray:
    """Raw rows whose codes take every value, which quantized gaussians would not."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    raw = np.random.randint(0, 256, (rows, columns // block, block_bytes), dtype=np.uint8)
    floats = 2 if type_ == Q.Q4_1 else 1
    heads = np.random.randn(rows, columns // block, floats).astype(np.float16)
    raw[..., : 2 * floats] = heads.view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("type_", TYPES)
def test_dequantize_is_bitwise_the_gguf_packages(type_: Q) -> None:
    raw = random_blocks(type_, 7, 160)
    weight = pack_blocks(raw, type_)
    assert weight.shape == (7, 160)
    expected = gguf.quants.dequantize(raw, type_)
    assert weight.dequantize().numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("type_", TYPES)
def test_blocks_come_back_byte_for_byte(type_: Q) -> None:
    raw = random_blocks(type_, 5, 96)
    np.testing.assert_array_equal(unpack_blocks(pack_blocks(raw, type_)), raw)


@pytest.mark.parametrize("type_", TYPES)
def test_bytes_held_are_the_files(type_: Q) -> None:
    raw = random_blocks(type_, 4, 64)
    assert pack_blocks(raw, type_).nbytes == raw.nbytes


@pytest.mark.parametrize("type_", [Q.Q4_0, Q.Q4_1])
def test_nibbles_by_hand(type_: Q) -> None:
    """Byte j of a block holds element j low and j+16 high; the canonical order is even, odd."""
    head = 4 if type_ == Q.Q4_1 else 2
    raw = np.zeros((1, head + 16), dtype=np.uint8)
    codes = np.random.randint(0, 16, 32)
    raw[0, head:] = [codes[j] | codes[j + 16] << 4 for j in range(16)]
    weight = pack_blocks(raw, type_)
    assert unpack_codes(weight.codes_NKp, 4)[0].tolist() == codes.tolist()
    assert weight.codes_NKp[0, 3].item() == codes[6] | codes[7] << 4


@pytest.mark.parametrize("type_", TYPES)
def test_layout(type_: Q) -> None:
    weight = pack_blocks(random_blocks(type_, 4, 64), type_)
    assert weight.codes_NKp.dtype == (torch.int8 if type_ == Q.Q8_0 else torch.uint8)
    assert weight.scale_NG.dtype == torch.float16
    assert weight.scale_NG.shape == (4, 2)
    assert (weight.zero_NG is not None) == (type_ == Q.Q4_1)
    for tensor in (weight.codes_NKp, weight.scale_NG):
        assert tensor.is_contiguous()


@pytest.mark.parametrize("type_", TYPES)
def test_shares_no_memory_with_the_blocks(type_: Q) -> None:
    raw = random_blocks(type_, 4, 64)
    weight = pack_blocks(raw, type_)
    before = weight.dequantize()
    raw[:] = 0xFF
    assert torch.equal(weight.dequantize(), before)


@pytest.mark.parametrize("type_", TYPES)
def test_take_rows_permutes_the_dense_rows(type_: Q) -> None:
    weight = pack_blocks(random_blocks(type_, 6, 64), type_)
    order = torch.randperm(6)
    taken = take_rows(weight, order)
    assert torch.equal(taken.dequantize(), weight.dequantize()[order])
    assert taken.source_format == type_.name


def test_other_block_types_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"Q5_0 blocks .* Q4_0, Q4_1, Q8_0 can"):
        pack_blocks(np.zeros((1, 22), dtype=np.uint8), Q.Q5_0)
