"""What a program's forward accepts, and what it refuses before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import CausalConvolution, tiny_llama
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import graphopt
from graphopt.check.inputs import longest_sequence
from graphopt.errors import RequestError
from graphopt.ir.limits import Limit
from graphopt.ir.text.parser import parse_graph
from graphopt.ir.text.printer import print_graph
from graphopt.program.program import Program


class Masked(nn.Module):
    """Ids and a float mask of the same batch and sequence; the mask's last axis is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.kinds = nn.Embedding(31, 8), nn.Embedding(5, 8)

    def forward(self, input_ids: Tensor, mask: Tensor, kinds: Tensor) -> Tensor:
        x_BSD = self.embed(input_ids) + self.kinds(kinds.unsqueeze(0)).squeeze(0)
        return (x_BSD * mask).flip(1)


class Positions(nn.Module):
    """Learned positions from `first` on, and a mean over the sequence where `mixes`."""

    def __init__(self, rows: int, first: int = 0, mixes: bool = False) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(31, 8), nn.Embedding(rows, 8)
        self.head, self.first, self.mixes = nn.Linear(8, 31), first, mixes

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1])[None] + self.first
        x_BSD = self.embed(input_ids) + self.positions(places)
        return self.head(x_BSD - x_BSD.mean(1, keepdim=True) if self.mixes else x_BSD)


@pytest.fixture(scope="module")
def masked() -> Program:
    torch.manual_seed(0)
    ids = torch.randint(0, 31, (3, 6))
    example = {"input_ids": ids, "mask": torch.rand(3, 6, 8), "kinds": torch.randint(0, 5, (3, 6))}
    axes = {0: "batch", 1: "sequence"}
    return graphopt.compile(
        Masked().eval(), example, dynamic={"input_ids": axes, "mask": axes, "kinds": axes}
    )


def given(batch: int = 2, length: int = 4, **changes: Any) -> dict[str, Any]:
    return {
        "input_ids": torch.randint(0, 31, (batch, length)),
        "mask": torch.rand(batch, length, 8),
        "kinds": torch.randint(0, 5, (batch, length)),
        **changes,
    }


def test_what_fits_is_computed(masked: Program) -> None:
    inputs = given(batch=5, length=3)
    weights = masked.weights()
    x = weights["embed.weight"][inputs["input_ids"]] + weights["kinds.weight"][inputs["kinds"]]
    torch.testing.assert_close(masked(**inputs), (x * inputs["mask"]).flip(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": [[1, 2]]}, r"'input_ids' must be a tensor, int64 \[batch, sequence\]"),
        ({"input_ids": torch.ones((2, 4), dtype=torch.int32)}, r"non-empty int64 .*got int32"),
        ({"input_ids": torch.rand(2, 4)}, r"'input_ids' must be .*int64 .*got float32"),
        ({"input_ids": torch.ones(4, dtype=torch.int64)}, r"got int64 \[4\]"),
        ({"input_ids": torch.ones((0, 4), dtype=torch.int64)}, "non-empty"),
        ({"mask": torch.rand(2, 4, 7)}, r"'mask' must be float32 \[batch, sequence, 8\], got"),
        ({"mask": torch.rand(2, 5, 8)}, "'sequence' is 4 in 'input_ids' axis 1 and 5 in 'mask'"),
        ({"mask": torch.rand(3, 4, 8)}, "'batch' is 2 in 'input_ids' axis 0 and 3 in 'mask'"),
        ({"mask": torch.rand(2, 4, 8, device="meta")}, "'mask' is on meta, where tensors have no"),
        ({"input_ids": torch.full((2, 4), 31)}, r"'input_ids' holds ids 31\.\.31.*0\.\.30"),
        ({"kinds": torch.full((2, 4), -1)}, r"'kinds' holds ids -1\.\.-1.*0\.\.4"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(masked: Program, changes: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        masked(**given(**changes))


def test_a_misspelt_input_is_named_with_the_near_one(masked: Program) -> None:
    with pytest.raises(RequestError, match=r"no input called 'masks'.*did you mean 'mask'"):
        masked(**given(masks=torch.rand(1)))


@pytest.mark.parametrize("saved", [False, True])
def test_fixed_sizes_are_kept(saved: bool, tmp_path: Path) -> None:
    program = graphopt.compile(tiny_llama(), torch.ones((2, 16), dtype=torch.int64), dynamic=False)
    if saved:
        program.save(tmp_path / "p")
        program = graphopt.load_program(tmp_path / "p")
    ids = torch.randint(0, 101, (2, 16))
    assert program(ids).shape == (2, 16, 101)  # type: ignore[union-attr]
    for shape, axis in (((2, 1), 1), ((2, 8), 1), ((5, 16), 0)):
        hint = rf"fixed by the example.*\{{{axis}: 'name'\}}"
        with pytest.raises(RequestError, match=hint):
            program(torch.ones(shape, dtype=torch.int64))


@pytest.mark.parametrize("options", [{}, {"serving": "off"}, {"backend": "reference"}])
def test_ids_outside_the_table_are_refused_on_every_path(options: dict[str, Any]) -> None:
    program = graphopt.compile(tiny_llama(), **options)
    with pytest.raises(RequestError, match=r"ids 100\.\.101; they must be 0\.\.100"):
        program(torch.tensor([[100, 101]]))


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("first", [0, 2])
def test_learned_positions_bound_the_sequence(
    saved: bool, mixes: bool, first: int, tmp_path: Path
) -> None:
    torch.manual_seed(first)
    model = Positions(8 + first, first, mixes).eval()
    program = graphopt.compile(model, torch.ones((2, 6), dtype=torch.int64))
    assert (program.serving is None) == mixes
    if saved:
        program.save(tmp_path / "p")
        program = graphopt.load_program(tmp_path / "p")
    assert program.options.max_context == 8
    ids = torch.randint(0, 31, (2, 8))
    torch.testing.assert_close(program(ids), model(ids).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(
        RequestError, match=r"'input_ids' has 9 along axis 1 .*the model takes at most 8"
    ):
        program(torch.randint(0, 31, (2, 9)))
    if not mixes:
        assert len(program.generate([1, 2, 3], max_tokens=6)[0].tokens) == 6
        with pytest.raises(RequestError, match="context of 8 leaves 6"):
            program.generate([1, 2, 3], max_tokens=7)


def test_the_capture_knows_its_bound() -> None:
    graph = graphopt.capture(Positions(11).eval(), torch.ones((2, 9), dtype=torch.int64))
    assert longest_sequence(graph) == 11
    # The table says it again after printing and parsing.
    again = parse_graph(print_graph(graph), graph.weights)
    assert longest_sequence(again) == 11
    graph.limits = (Limit("sequence", "<=", 5),)
    assert longest_sequence(graph) == 5
    assert longest_sequence(graphopt.capture(tiny_llama())) is None


def test_the_smaller_of_configuration_and_capture_counts() -> None:
    graph = graphopt.capture(tiny_llama())
    graph.limits = (Limit("sequence", "<=", 40),)
    assert graphopt.compile(graph).options.max_context == 40
    assert graphopt.compile(tiny_llama(max_position_embeddings=64)).options.max_context == 64


def test_positions_that_only_the_run_knows() -> None:
    class Counted(CausalConvolution):
        def forward(self, input_ids: Tensor) -> Tensor:
            return self.embed(torch.cumsum(input_ids, 1))

    program = graphopt.compile(Counted().eval(), torch.ones((2, 8), dtype=torch.int64))
    assert program(torch.ones((1, 30), dtype=torch.int64)) is not None
    with pytest.raises(RequestError, match="an id or a position is outside its table"):
        program(torch.ones((1, 31), dtype=torch.int64))


class Own(Tensor):
    """A subclass."""


ODD_TENSORS: dict[str, tuple[Any, str]] = {
    "sparse": (lambda ids: ids.to_sparse(), "has the layout sparse_coo"),
    "subclass": (lambda ids: ids.as_subclass(Own), "is a Own"),
    "vmap": (None, "inside a transform of torch.func"),
    "huge": (lambda ids: ids[:1, :1].expand(10**6, 10**6), "cannot be read: .*memory"),
}


@pytest.fixture(scope="module")
def served() -> dict[str, Program]:
    return {b: graphopt.compile(tiny_llama(layers=1), backend=b) for b in ("cpu", "reference")}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_tensors_that_are_not_plain_are_named(
    served: dict[str, Program], backend: str, kind: str
) -> None:
    made, message = ODD_TENSORS[kind]
    program, ids = served[backend], torch.ones((2, 4), dtype=torch.int64)
    call = program if made is None else lambda ids: program(made(ids))
    if made is None:
        call = torch.vmap(lambda row: program(row[None]))
    with pytest.raises(RequestError, match=message):
        call(ids)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_tensors_without_values_are_named(served: dict[str, Program], backend: str) -> None:
    ids = torch.ones((2, 4), dtype=torch.int64)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with pytest.raises(RequestError, match="FakeTensorMode traces without them"):
            served[backend](ids)
        fake = mode.from_tensor(ids)
    with pytest.raises(RequestError, match="is a fake tensor"):
        served[backend](fake)
    with pytest.raises(RequestError, match="make_fx traces without them"):
        make_fx(served[backend])(ids)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_where_the_caller_stands_makes_no_difference(
    served: dict[str, Program], backend: str
) -> None:
    program = served[backend]
    ids = torch.randint(0, 101, (2, 6))
    expected, tokens = program(ids), program.generate([1, 2, 3], max_tokens=3)[0].tokens
    torch.testing.assert_close(program(ids.t().contiguous().t()), expected, rtol=0, atol=0)
    with torch.device("meta"):
        torch.testing.assert_close(program(ids), expected, rtol=0, atol=0)
        assert program.generate([1, 2, 3], max_tokens=3)[0].tokens == tokens
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(program(ids), expected, rtol=0, atol=0)
    with torch.inference_mode():
        assert torch.equal(program(ids), expected)
    found = torch.compile(lambda x: program(x), backend="eager")(ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_forward_graph_stands_in_no_autocast_either() -> None:
    model = nn.Linear(8, 8).eval()
    program = graphopt.compile(model, torch.randn(3, 8))
    x = torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = program(x)
    assert isinstance(found, Tensor)
    assert not found.requires_grad
    torch.testing.assert_close(found, model(x).detach())
