"""Nothing that reaches the native kernels points outside the cache or the rows of a step."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from helpers.serving_steps import Steps
from helpers.tiny_models import tiny_llama
from torch import Tensor, nn

import graphopt
from graphopt.codegen.cpu.backend import CpuBackend
from graphopt.codegen.cpu.build import load_library
from graphopt.codegen.reference import ReferenceBackend, TensorCache
from graphopt.errors import BackendError, CapacityError, GraphoptError, VerifyError
from graphopt.ir.graph import Graph
from graphopt.ir.text.parser import parse_graph
from graphopt.ir.text.printer import print_graph


@pytest.fixture(scope="module")
def program() -> graphopt.Program:
    return graphopt.compile(tiny_llama(), threads=2)


@pytest.fixture(scope="module")
def serving() -> Graph:
    graph = graphopt.compile(tiny_llama(), backend="reference").serving
    assert graph is not None
    return graph


def step_inputs() -> dict[str, Tensor]:
    """Two requests of 3 and 2 rows on 6 blocks of 4 tokens."""
    return {
        "tokens": torch.tensor([1, 2, 3, 4, 5]),
        "positions": torch.tensor([0, 1, 2, 0, 1]),
        "slots": torch.tensor([4, 5, 6, 8, 9]),
        "query_start": torch.tensor([0, 3, 5]),
        "kv_lens": torch.tensor([3, 2]),
        "block_tables": torch.tensor([[1, 0], [2, 0]]),
        "logit_rows": torch.tensor([2, 4]),
    }


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("slots", 1, 24),
        ("slots", 4, 10**12),
        ("query_start", 0, 1),
        ("query_start", 1, -1),
        ("query_start", 2, 4),
        ("kv_lens", 0, 2),
        ("kv_lens", 0, 9),
        ("kv_lens", 1, -1),
        ("block_tables", 0, 6),
        ("block_tables", 2, -1),
        ("logit_rows", 0, 5),
        ("logit_rows", 1, -1),
    ],
)
def test_step_inputs_out_of_range(
    program: graphopt.Program, name: str, place: int, value: int
) -> None:
    executable = program.executable
    cache = executable.new_cache(6, 4)
    good = executable(cache, **step_inputs())
    inputs = step_inputs()
    inputs[name].view(-1)[place] = value
    with pytest.raises(BackendError, match=f"step input '{name}' points outside the 5 rows"):
        executable(cache, **inputs)
    assert torch.equal(executable(cache, **step_inputs()), good)


@pytest.mark.parametrize("count", [0, 6, 500])
def test_as_many_rows_of_logits_as_there_are_rows(program: graphopt.Program, count: int) -> None:
    """The arena has room for one a row."""
    executable = program.executable
    inputs = step_inputs() | {"logit_rows": torch.full((count,), 2)}
    with pytest.raises(BackendError, match="step input 'logit_rows' points outside the 5 rows"):
        executable(executable.new_cache(6, 4), **inputs)


@pytest.mark.parametrize("name", list(step_inputs()))
@pytest.mark.parametrize("wrong", ["short", "long", "empty", "int32", "apart", "wide"])
def test_step_inputs_of_another_shape_or_dtype(
    program: graphopt.Program, name: str, wrong: str
) -> None:
    executable = program.executable
    cache, inputs = executable.new_cache(6, 4), step_inputs()
    value = inputs[name]
    if name == "logit_rows" and wrong in ("short", "long"):
        pytest.skip("any number of rows may be wanted")
    inputs[name] = {
        "short": value[:-1],
        "long": torch.cat([value, value]),
        "empty": value[:0],
        "int32": value.int(),
        "apart": torch.stack([value, value], -1)[..., 0],
        "wide": value.unsqueeze(-1),
    }[wrong]
    with pytest.raises(BackendError, match="step input '"):
        executable(cache, **inputs)
    executable(cache, **step_inputs())


CHANGED_CACHES: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "fewer heads": lambda tensors: [t[:, :, :1].contiguous() for t in tensors],
    "narrower": lambda tensors: [t[..., :8].contiguous() for t in tensors],
    "fewer layers": lambda tensors: tensors[:2],
    "more layers": lambda tensors: [*tensors, *tensors],
    "uneven": lambda tensors: [*tensors[1:], tensors[0][:5]],
    "apart": lambda tensors: [*tensors[1:], torch.stack([tensors[0]] * 2, -1)[..., 0]],
    "dtype": lambda tensors: [*tensors[1:], tensors[0].double()],
}


@pytest.mark.parametrize("change", list(CHANGED_CACHES))
def test_caches_of_another_program_are_refused(program: graphopt.Program, change: str) -> None:
    good = program.executable(program.executable.new_cache(6, 4), **step_inputs())
    cache = program.executable.new_cache(6, 4)
    changed = CHANGED_CACHES[change](list(cache.tensors))  # type: ignore[attr-defined]
    with pytest.raises(BackendError, match="this cache was made by another executable"):
        program.executable(TensorCache(tuple(changed)), **step_inputs())
    assert torch.equal(program.executable(cache, **step_inputs()), good)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("input %positions : i64[rows]", "input %positions : i64[logit_rows]"),
        ("input %slots : i64[rows]", "input %slots : i64[requests]"),
        ("input %logit_rows : i64[logit_rows] user", "input %logit_rows : i64[logit_rows] user\n"
         "input %more : i64[rows] user"),
    ],
)  # fmt: skip
def test_inputs_that_no_step_gives_are_refused(serving: Graph, old: str, new: str) -> None:
    text = print_graph(serving)
    assert old in text
    notes: list[str] = []
    try:
        graph = parse_graph(text.replace(old, new), serving.weights)
        CpuBackend(load_library(), 1, notes.append).lower_serving(graph, None, None)
    except GraphoptError:
        return
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [("%slots)", "%tokens)"), ("%query_start, %kv_lens", "%kv_lens, %query_start")],
)
def test_a_graph_that_hands_cache_ops_other_numbers_is_refused(
    serving: Graph, old: str, new: str
) -> None:
    text = print_graph(serving)
    assert old in text
    graph = parse_graph(text.replace(old, new), serving.weights)
    for backend in (ReferenceBackend(), CpuBackend(load_library())):
        with pytest.raises(VerifyError, match="is not the step input"):
            backend.lower_serving(graph, None, None)


def test_no_memory_for_a_step(program: graphopt.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    executable = program.executable
    cache = executable.new_cache(6, 4)
    good = executable(cache, **step_inputs())

    def full(*_: object, **__: object) -> Tensor:
        raise RuntimeError("not enough memory: you tried to allocate 1 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        with pytest.raises(CapacityError, match="not enough memory to compute 5 token rows"):
            executable(cache, **step_inputs())
    assert torch.equal(executable(cache, **step_inputs()), good)


def test_threads_share_a_program(program: graphopt.Program) -> None:
    ids = [torch.tensor([row]) for row in ([1, 2, 3], [9, 8, 7, 6, 5, 4], [5] * 40)]
    expected = [program(row) for row in ids]
    wrong: list[int] = []

    def work(k: int) -> None:
        wrong.extend(k for _ in range(60) if not torch.equal(program(ids[k]), expected[k]))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Plain(nn.Module):
    """A language model without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(31, 16), nn.Linear(16, 31)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


def test_dtypes_without_kernels_are_computed_by_torch() -> None:
    model, ids = Plain().double().eval(), torch.randint(0, 30, (2, 6))
    program = graphopt.compile(model, ids)
    for _ in range(3):
        assert torch.equal(program(ids), model(ids))


def test_random_steps_pass_the_check(program: graphopt.Program) -> None:
    steps = Steps(program.executable, [[1, 2, 3, 4, 5, 6, 7], [8, 9], [3] * 11])
    whole = Steps(program.executable, [[1, 2, 3, 4, 5, 6, 7], [8, 9], [3] * 11]).run([7, 2, 11])
    for ours, theirs in zip(steps.run_in_chunks(3), whole, strict=True):
        assert torch.equal(ours, theirs)
