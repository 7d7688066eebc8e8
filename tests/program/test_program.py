"""compile, Program, saving and loading: the product's front door."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import CausalConvolution, tiny_llama
from safetensors.torch import save_file
from torch import nn

import graphopt
from graphopt import codegen
from graphopt.codegen.cpu import backend as cpu_backend
from graphopt.errors import (
    BackendError,
    CaptureError,
    ExpectationError,
    PassError,
    ProgramFormatError,
    RequestError,
    RowDependenceError,
    UnsupportedError,
)
from graphopt.ir.text.parser import first_difference
from graphopt.models.reference.bert import BertLike, BertLikeConfig
from graphopt.models.reference.gpt2 import GPT2Like, GPT2LikeConfig
from graphopt.program.program import Program
from graphopt.program.save import mapped_weights


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def program(model: Any) -> Program:
    return graphopt.compile(model)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 17), (2, 40)])
def test_logits_are_the_models(model: Any, backend: str, batch: int, length: int) -> None:
    program = graphopt.compile(model, backend=backend)
    ids = torch.randint(0, 101, (batch, length))
    logits = program(ids)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_bfloat16(model: Any) -> None:
    low = tiny_llama().to(torch.bfloat16)
    program = graphopt.compile(low)
    ids = torch.randint(0, 101, (2, 9))
    logits = program(ids)
    assert isinstance(logits, torch.Tensor)
    assert logits.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(logits, low(ids).logits, rtol=5e-2, atol=5e-2)


def test_generation_equals_transformers(model: Any, program: Program) -> None:
    prompts = [torch.randint(0, 101, (n,)).tolist() for n in (1, 5, 23)]
    completions = program.generate(prompts, max_tokens=12, ignore_eos=True)
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt])
        for token in completion.tokens:
            with torch.no_grad():
                logits = model(ids).logits[0, -1]
            assert logits[token] >= logits.max() - 1e-4
            ids = torch.cat([ids, torch.tensor([[token]])], 1)


def test_a_model_that_mixes_rows_still_compiles_and_says_why_it_cannot_serve() -> None:
    model = CausalConvolution().eval()
    ids = torch.randint(0, 31, (2, 8))
    program = graphopt.compile(model, ids)
    torch.testing.assert_close(program(ids), model(ids).detach())
    with pytest.raises(RowDependenceError, match=r"tiny_models\.py:\d+"):
        program.generate([1, 2, 3])
    with pytest.raises(RowDependenceError):
        graphopt.compile(model, ids, serving="required")


def test_a_causal_convolution_is_named_with_its_line() -> None:
    class Plain(CausalConvolution):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x_BDS = self.embed(input_ids).transpose(1, 2)
            return self.head(self.conv(x_BDS).transpose(1, 2))

    model = Plain().eval()
    model.conv = nn.Conv1d(16, 16, 3, padding=1).eval()
    with pytest.raises(RowDependenceError, match=r"aten\.conv1d .*test_program\.py:\d+"):
        graphopt.compile(model, torch.ones((2, 8), dtype=torch.int64), serving="required")


def test_other_architectures() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (2, 9))
    gpt2 = GPT2Like(GPT2LikeConfig()).eval()
    torch.testing.assert_close(
        graphopt.compile(gpt2, ids)(ids), gpt2(ids).detach(), rtol=1e-4, atol=2e-5
    )
    bert, mask = BertLike(BertLikeConfig()).eval(), torch.ones_like(ids)
    program = graphopt.compile(bert, {"input_ids": ids, "attention_mask": mask})
    expected = bert(ids, mask).detach()
    torch.testing.assert_close(program(ids, mask), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(program(attention_mask=mask, input_ids=ids), expected)
    with pytest.raises(RequestError, match="attention_mask"):
        program(ids)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "tpu"}, UnsupportedError, "backend='tpu'.*cpu"),
        ({"activations": "int3"}, UnsupportedError, "activations='int3'.*int8"),
        ({"kv_dtype": "int4"}, UnsupportedError, "kv_dtype='int4'.*float16"),
        ({"serving": "maybe"}, UnsupportedError, "serving='maybe'"),
        ({"passes": ["no_such_pass"]}, PassError, "no_such_pass"),
        ({"disable": ["no_such_pass"]}, PassError, "no_such_pass"),
        ({"disable": ["insert_kv_cache"]}, PassError, "must run"),
        ({"limits": {"no_such_pass": 1}}, PassError, "no_such_pass"),
        ({"expect": {"no_such_pass": 1}}, PassError, "no_such_pass"),
        ({"expect": {"fuse_norm": 7}}, ExpectationError, "expected 7 of fuse_norm, found 5"),
        ({"expect": {"graphopt.rope": 1}}, ExpectationError, "1 of graphopt.rope, found 4"),
        ({"dynamic": {"nothing": {0: "batch"}}}, CaptureError, "nothing"),
        ({"example": {"wrong": torch.ones(2, 2)}}, CaptureError, "specify .* input_ids"),
    ],
)
def test_bad_options_are_named(
    model: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        graphopt.compile(model, **arguments)


def test_training_mode_is_refused(model: Any) -> None:
    with pytest.raises(CaptureError, match=r"eval\(\)"):
        graphopt.compile(tiny_llama().train())


def test_limits_and_disabling(model: Any) -> None:
    program = graphopt.compile(model, limits={"fuse_norm": 2}, disable=["fuse_rope"])
    assert program.report.sites("fuse_norm") == 2
    assert program.report.sites("fuse_rope") == 0
    ids = torch.randint(0, 101, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(program(ids), model(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_report_has_times_sites_and_nodes(program: Program) -> None:
    assert {"load", "capture", "passes", "lower"} <= set(program.report.seconds)
    for record in program.report.passes:
        assert record.milliseconds >= 0
        assert record.nodes_after > 0
    table = program.report.table()
    assert [column.header for column in table.columns][:3] == ["pass", "ms", "sites"]
    assert table.row_count == len(program.report.passes)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.randint(0, 9, (5,)), r"batch, sequence"),
        (torch.zeros((0, 4), dtype=torch.int64), "non-empty"),
        (torch.tensor([[1, 101]]), r"0\.\.100"),
        (torch.tensor([[-1, 3]]), r"0\.\.100"),
        (torch.zeros((1, 513), dtype=torch.int64), "513 tokens"),
        (torch.zeros((1, 3)), "int64"),
    ],
)
def test_bad_ids_are_refused(program: Program, ids: torch.Tensor, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        program(ids)


def test_without_a_compiler_the_reference_backend_runs_with_a_note(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler() -> None:
        raise BackendError("no C++ compiler found (tried g++)")

    monkeypatch.setattr(cpu_backend, "load_library", no_compiler)
    program = graphopt.compile(model)
    (note,) = program.report.notes
    assert "no C++ compiler" in note
    ids = torch.randint(0, 101, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(program(ids), model(ids).logits, rtol=1e-4, atol=1e-5)
    assert codegen is not None


def test_save_and_load(model: Any, program: Program, tmp_path: Path) -> None:
    program.save(tmp_path / "p")
    loaded = graphopt.load_program(tmp_path / "p")
    ids = torch.randint(0, 101, (2, 19))
    assert torch.equal(torch.as_tensor(loaded(ids)), torch.as_tensor(program(ids)))
    assert first_difference(program.graph, loaded.graph) is None
    assert loaded.serving is not None
    assert program.serving is not None
    assert first_difference(program.serving, loaded.serving) is None
    assert loaded.generate([1, 2, 3], max_tokens=4) is not None
    # A loaded program can be saved again, and nothing in it is a pickle.
    loaded.save(tmp_path / "again")
    for file in (tmp_path / "again").rglob("*"):
        assert file.suffix in {".gir", ".json", ".safetensors", ""}, file
    reference = graphopt.load_program(tmp_path / "again", backend="reference")
    torch.testing.assert_close(reference(ids), program(ids), rtol=1e-4, atol=1e-5)


def test_a_refusal_survives_saving(tmp_path: Path) -> None:
    program = graphopt.compile(CausalConvolution().eval(), torch.ones((2, 8), dtype=torch.int64))
    program.save(tmp_path / "p")
    with pytest.raises(RowDependenceError, match=r"tiny_models\.py"):
        graphopt.load_program(tmp_path / "p").generate([1])


def test_saving_never_overwrites(program: Program, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ProgramFormatError, match="not an empty folder"):
        program.save(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def _alter(folder: Path) -> None:
    text = (folder / "forward.gir").read_text()
    (folder / "forward.gir").write_text(text.replace("eps=1e-06", "eps=1e-03", 1))


def _truncate(folder: Path) -> None:
    data = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(data[:-1])


def _remove(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()


def _add(folder: Path) -> None:
    (folder / "evil.pkl").write_text("x")


def _format(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


def _damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def _no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_alter, "forward.gir was altered"),
        (_truncate, "weights.safetensors was altered"),
        (_remove, "weights.safetensors is missing"),
        (_add, "evil.pkl is not listed"),
        (_format, "format 99"),
        (_damage_manifest, "damaged"),
        (_no_manifest, "no saved program"),
    ],
)
def test_damaged_programs_are_refused(
    program: Program, tmp_path: Path, damage: Any, message: str
) -> None:
    program.save(tmp_path / "p")
    damage(tmp_path / "p")
    with pytest.raises(ProgramFormatError, match=message):
        graphopt.load_program(tmp_path / "p")


def test_dumps(model: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    program = graphopt.compile(model, dump=tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.gir"))
    assert files[0] == "00_capture.gir"
    assert any(name.endswith("_fuse_norm.gir") for name in files)
    assert files[-1].endswith("_insert_kv_cache.gir")
    assert not any("fold_low_bit" in name for name in files)  # changed nothing
    assert "graphopt.rms_norm" in next(tmp_path.glob("*_fuse_norm.gir")).read_text()
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert program.serving is not None


def test_mapped_weights_are_the_files(tmp_path: Path) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.bool)
    dtypes += (torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2)
    weights = {
        f"{str(dtype).removeprefix('torch.')}.{rank}": (100 * torch.randn((3, 5, 2)[:rank])).to(
            dtype
        )
        for dtype in dtypes
        for rank in range(4)
    }
    weights |= {"ids": torch.arange(7), "empty": torch.empty(0, 4)}
    save_file(weights, tmp_path / "w.safetensors", metadata={"format": "pt"})
    found = mapped_weights(tmp_path / "w.safetensors")
    assert set(found) == set(weights)
    for name, weight in weights.items():
        assert found[name].dtype == weight.dtype
        # Not all types can be compared.
        assert torch.equal(found[name].to(torch.complex64), weight.to(torch.complex64)), name


def test_a_cut_weights_file_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.randn(100)}, tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    for length in (3, 20, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        with pytest.raises(ProgramFormatError, match="damaged"):
            mapped_weights(tmp_path / "cut.safetensors")
