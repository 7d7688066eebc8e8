"""acme::relu_squared: `max(x, 0) ** 2`. Source: So et al. 2021, arXiv 2109.08668."""

from torch import Tensor

from graphopt.ir.opset import Cost, define, nbytes


def reference(x: Tensor) -> Tensor:
    """Any shape and floating dtype; the result has both."""
    return x.relu().square()


def fake(x: Tensor) -> Tensor:
    """Like x, contiguous."""
    return x.new_empty(x.shape)


def cost(x: Tensor) -> Cost:
    """Two operations an element."""
    return Cost(2.0 * x.numel(), 2.0 * nbytes(x))


SPEC = define(
    "acme::relu_squared(Tensor x) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    rows="pointwise",
)
