import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers.gguf_samples import Q, tiny_llama, write_gguf

from graphopt.errors import WeightFormatError
from graphopt.models.gguf.file import open_gguf


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "sample.gguf"
    types = {"blk.0.ffn_up.weight": Q.Q4_1, "blk.1.ffn_up.weight": Q.Q8_0, "output.weight": Q.F16}
    write_gguf(path, tiny_llama(), quantize=lambda name: types.get(name, Q.F32), tokenizer=True)
    return path


def test_metadata_equal_the_gguf_packages_reader(sample: Path) -> None:
    oracle = gguf.GGUFReader(sample)
    expected = {
        key: field.contents() for key, field in oracle.fields.items() if not key.startswith("GGUF.")
    }
    assert dict(open_gguf(sample).metadata) == expected


def test_tensors_equal_the_gguf_packages_reader(sample: Path) -> None:
    file = open_gguf(sample)
    oracle = gguf.GGUFReader(sample)
    assert list(file.tensors) == [tensor.name for tensor in oracle.tensors]
    for expected in oracle.tensors:
        tensor = file.tensors[expected.name]
        assert tensor.type == expected.tensor_type
        assert tensor.shape == tuple(reversed(expected.shape.tolist()))
        assert file.read(tensor).tobytes() == expected.data.tobytes()


def test_every_scalar_and_array_type(tmp_path: Path) -> None:
    path = tmp_path / "types.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values = {
        "uint8": 200, "int8": -7, "uint16": 60000, "int16": -30000, "uint32": 4_000_000_000,
        "int32": -2_000_000_000, "uint64": 1 << 60, "int64": -(1 << 60), "bool": True,
        "float32": 0.5, "float64": 1e-300, "string": "déjà",
    }  # fmt: skip
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"t.{kind}", value)
    writer.add_array("t.strings", ["a", "", "ß"])
    writer.add_array("t.numbers", [1.5, -2.5])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = open_gguf(path).metadata
    assert {kind: metadata[f"t.{kind}"] for kind in values} == values
    assert metadata["t.strings"] == ["a", "", "ß"]
    assert metadata["t.numbers"] == [1.5, -2.5]


def test_custom_alignment(tmp_path: Path) -> None:
    path = tmp_path / "aligned.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(256)
    arrays = {f"t{i}": np.random.rand(3 + i).astype(np.float32) for i in range(3)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(path)
    for name, array in arrays.items():
        assert file.tensors[name].offset % 256 == 0
        np.testing.assert_array_equal(file.read(file.tensors[name]).view(np.float32), array)


def test_header_digest_ignores_weights_but_not_metadata(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.gguf" for i in range(3)]
    model = tiny_llama()
    write_gguf(paths[0], model)
    write_gguf(paths[1], tiny_llama())
    write_gguf(paths[2], model, keys={"rope.freq_base": 7000.0})
    digests = [open_gguf(path).header_sha256 for path in paths]
    assert digests[0] == digests[1] != digests[2]


def test_not_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(WeightFormatError, match="not a GGUF file"):
        open_gguf(path)


@pytest.mark.parametrize("version", [1, 4, 3 << 24])
def test_other_versions_are_refused(sample: Path, version: int) -> None:
    data = bytearray(sample.read_bytes())
    data[4:8] = struct.pack("<I", version)
    sample.write_bytes(data)
    with pytest.raises(WeightFormatError, match=f"version {version} .*big-endian"):
        open_gguf(sample)


@pytest.mark.parametrize("keep", [0, 3, 20, 300, 0.5, -1])
def test_truncation_is_found_at_once(sample: Path, keep: float) -> None:
    data = sample.read_bytes()
    sample.write_bytes(data[: int(len(data) * keep)] if 0 < keep < 1 else data[: int(keep)])
    with pytest.raises(WeightFormatError, match=r"truncated|not a GGUF"):
        open_gguf(sample)


def test_damaged_length_does_not_allocate(sample: Path) -> None:
    data = bytearray(sample.read_bytes())
    data[24:32] = struct.pack("<Q", 1 << 62)  # length of the first key
    sample.write_bytes(data)
    with pytest.raises(WeightFormatError, match="damaged in its header"):
        open_gguf(sample)


def test_unknown_value_type(sample: Path) -> None:
    data = bytearray(sample.read_bytes())
    (length,) = struct.unpack_from("<Q", data, 24)
    data[32 + length : 36 + length] = struct.pack("<I", 99)
    sample.write_bytes(data)
    with pytest.raises(WeightFormatError, match="unknown type 99"):
        open_gguf(sample)


def test_unknown_block_type(sample: Path) -> None:
    data = sample.read_bytes()
    name = b"blk.1.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    sample.write_bytes(data[:at] + struct.pack("<I", 4242) + data[at + 4 :])
    with pytest.raises(WeightFormatError, match=r"blk\.1\.ffn_up\.weight .* block type 4242"):
        open_gguf(sample)
