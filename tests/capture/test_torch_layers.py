"""torch's own transformer layers: whatever a mask holds, the graph applies it."""

from __future__ import annotations

import pytest
import torch
from helpers.run_graph import CLEANUP, apply, assert_close, run
from torch import Tensor, nn
from torch.nn.modules import transformer

from graphopt.capture import capture
from graphopt.errors import CaptureError
from graphopt.ir.graph import argument
from graphopt.ops import attention


class Encoder(nn.Module):
    """Tokens through nn.TransformerEncoder with a mask that `make(length)` gives."""

    def __init__(self, kind: str, batch_first: bool) -> None:
        super().__init__()
        self.kind, self.batch_first = kind, batch_first
        self.embed = nn.Embedding(30, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        if self.kind == "others":
            mask = mask.mT
        elif self.kind == "fails":
            mask = mask + torch.tensor(float(mask.sum()))
        x = self.embed(ids)
        if self.batch_first:
            return self.encoder(x, mask)
        return self.encoder(x.transpose(0, 1), mask).transpose(0, 1)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["causal", "others"])
def test_a_mask_is_applied(kind: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    model = Encoder(kind, batch_first).eval()
    graph = capture(model, torch.randint(0, 30, (2, 9)))
    ids = torch.randint(0, 30, (3, 13))
    assert_close(run(graph, ids), model(ids))
    apply(graph, *CLEANUP, "fuse_attention", "dead_code")
    assert_close(run(graph, ids), model(ids))
    (node,) = graph.calls(attention.SPEC.overload)
    assert argument(node, "causal") == (kind == "causal")


@pytest.mark.parametrize("kind", ["causal", "fails"])
def test_torch_is_as_it_was(kind: str) -> None:
    was, detect = torch.backends.mha.get_fastpath_enabled(), transformer._detect_is_causal_mask
    model = Encoder(kind, batch_first=True).eval()
    if kind == "fails":
        with pytest.raises(CaptureError):
            capture(model, torch.randint(0, 30, (2, 9)))
    else:
        capture(model, torch.randint(0, 30, (2, 9)))
    assert torch.backends.mha.get_fastpath_enabled() == was
    assert transformer._detect_is_causal_mask is detect
