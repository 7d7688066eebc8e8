"""The pass on a graph written by hand: fired, refused, and the same values before and after."""

from pathlib import Path

import pytest
import torch

from graphopt.check.golden import read_golden
from graphopt.codegen.reference import ReferenceBackend
from graphopt.testing import GoldenError

GOLDEN = Path(__file__).parent / "golden"


def test_relu_then_square(golden_graph):
    after = golden_graph.replay("fuse_relu_squared", "fuse_relu_squared")
    before = read_golden(GOLDEN / "fuse_relu_squared.gir").graph(0)
    x = torch.randn(3, 8)
    (found,), (expected,) = (ReferenceBackend().lower(graph)(x) for graph in (after, before))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("name", "code"), [("shared", "relu-shared"), ("cosine", "not-relu")])
def test_look_alikes(golden_graph, name, code):
    with pytest.raises(GoldenError, match=f"did not fire .*{code}"):
        golden_graph.replay(name, "fuse_relu_squared")
