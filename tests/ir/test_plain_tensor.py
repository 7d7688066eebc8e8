"""Which tensors a graph can compute with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.ir.plain_tensor import why_not_plain


class Own(Tensor):
    """A subclass."""


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.empty(3)


def released() -> Tensor:
    made = torch.randn(8)
    made.untyped_storage().resize_(0)
    return made


ODD: dict[str, Callable[[], Tensor]] = {
    "layout sparse_coo": lambda: torch.randn(3, 4).to_sparse(),
    "layout sparse_csr": lambda: torch.randn(3, 4).to_sparse_csr(),
    "nested tensor": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "nested tensor;": lambda: torch.nested.nested_tensor(
        [torch.ones(2), torch.ones(3)], layout=torch.jagged
    ),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "is a Own": lambda: torch.ones(3).as_subclass(Own),
    "fake tensor": fake,
    "on meta": lambda: torch.empty(3, device="meta"),
    "no memory": released,
}
PLAIN: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(3, 4).t(),
    "part": lambda: torch.randn(3, 4)[:, 1:],
    "expanded": lambda: torch.randn(4).expand(3, 4),
    "parameter": lambda: nn.Parameter(torch.randn(3)),
    "buffer": lambda: nn.Buffer(torch.randn(3)),
    "of no element": lambda: torch.randn(0, 3),
    "of no axis": lambda: torch.tensor(1.0),
    "conjugated": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "with gradient": lambda: torch.randn(3, requires_grad=True) * 2,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ODD)
def test_what_is_in_the_way_is_told(what: str) -> None:
    assert what in str(why_not_plain(ODD[what]()))


@pytest.mark.parametrize("what", PLAIN)
def test_views_and_gradients_are_plain(what: str) -> None:
    assert why_not_plain(PLAIN[what]()) is None


def test_values_within_a_transform() -> None:
    reasons: list[str | None] = []

    def note(x: Tensor) -> Tensor:
        reasons.append(why_not_plain(x))
        return x.sum()

    torch.vmap(note)(torch.randn(2, 3))
    torch.func.grad(note)(torch.randn(3))
    assert [str(reason).startswith("is inside a transform") for reason in reasons] == [True] * 2
