"""What the proof of row independence must refuse, each with its op and source line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.passes.manager import PassManager
from graphopt.record.report import Rejection, Report

WIDTH, VOCABULARY = 8, 31
sdpa = nn.functional.scaled_dot_product_attention


class Body(nn.Module):
    """Embedding, `body` on [B, S, D] (and the ids), projection. `table` is a weight [64, D]."""

    def __init__(self, body: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.table = nn.Parameter(torch.randn(64, WIDTH))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(input_ids), self.table, input_ids))


def outcome(body: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Rejection | None:
    """The refusal, None when the model is served."""
    graph = capture(Body(body).eval(), torch.randint(0, VOCABULARY, (3, 9)))
    names = ["remove_noops", "canonicalize_views", "fuse_attention", "insert_kv_cache"]
    PassManager(names).run(graph, report := Report())
    rejections = report.rejections("insert_kv_cache")
    assert (graph.dialect == "serving") == (not rejections)
    return rejections[0] if rejections else None


def refused(body: Callable[[Tensor, Tensor, Tensor], Tensor], code: str, op: str = "") -> None:
    rejection = outcome(body)
    assert rejection is not None
    assert rejection.code == code, rejection
    assert op in rejection.text
    assert rejection.source.startswith("test_row_refusals.py:")


@pytest.mark.parametrize(
    ("body", "op"),
    [
        (lambda x, w, ids: x - x.mean(0, keepdim=True), "aten.mean"),
        (lambda x, w, ids: x - x.sum(0), "aten.sum"),
        (lambda x, w, ids: x.softmax(0), "aten.softmax"),
        (lambda x, w, ids: x.cumsum(0), "aten.cumsum"),
        (lambda x, w, ids: x.flip(0), "aten.flip"),
        (lambda x, w, ids: x + x[:1], "aten.slice"),
        (lambda x, w, ids: x + x[0], "aten.select"),
        (lambda x, w, ids: x + x[-1:], "aten.slice"),
        (lambda x, w, ids: x + x.sort(0)[0], "aten.sort"),
        (lambda x, w, ids: x.permute(1, 2, 0).softmax(-1).permute(2, 0, 1), "aten.softmax"),
        (lambda x, w, ids: x.unsqueeze(0) - x.unsqueeze(1).mean(0), "aten.mean"),
        (lambda x, w, ids: torch.stack([x, x]).amax(1), "aten.amax"),
        (lambda x, w, ids: x * torch.arange(x.shape[0])[:, None, None], "aten.arange"),
        (lambda x, w, ids: x + w[: x.shape[0], None], "aten.slice"),
        (lambda x, w, ids: x * x.shape[0], "aten.mul"),
        (lambda x, w, ids: x.transpose(0, 1).reshape(x.shape[0], x.shape[1], WIDTH), "reshape"),
        (
            lambda x, w, ids: x.transpose(0, 1).reshape(-1, WIDTH).reshape(x.shape),
            "reshape",
        ),
        (lambda x, w, ids: torch.cat([x, x])[: x.shape[0]], "aten.cat"),
        (lambda x, w, ids: x * torch.ones(x.shape[0], 1, 1).cumsum(0), "aten.cumsum"),
    ],
)
def test_ops_that_mix_batch_items(
    body: Callable[[Tensor, Tensor, Tensor], Tensor], op: str
) -> None:
    rejection = outcome(body)
    assert rejection is not None
    assert rejection.code in ("batch-mixed", "rows-mixed")
    assert op in rejection.text
    assert rejection.source.startswith("test_row_refusals.py:")


def test_a_product_over_the_batch() -> None:
    def body(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        x_SDB = x.permute(1, 2, 0)
        ones_BB = torch.ones(x.shape[0], 1).expand(-1, 4)
        return x + torch.matmul(x_SDB, ones_BB).mean(-1)

    refused(body, "batch-mixed", "aten.matmul")


@pytest.mark.parametrize(
    ("body", "op"),
    [
        (lambda x, w, ids: x + w[:1].expand(x.shape[1], -1).cumsum(0), "aten.cumsum"),
        (lambda x, w, ids: x + w[: x.shape[1]].flip(0), "aten.flip"),
        (lambda x, w, ids: x + w[: x.shape[1]].mean(0), "aten.mean"),
        (lambda x, w, ids: x + w[-x.shape[1] :], "aten.slice"),
        (lambda x, w, ids: x + w[: 2 * x.shape[1] : 2], "aten.slice"),
        (lambda x, w, ids: x + torch.full([WIDTH], x.shape[1]), "aten.full"),
        (lambda x, w, ids: x * x.shape[1] ** 0.5, "aten.mul"),
        (lambda x, w, ids: x + (ids[:, :, None] == ids[:, None, :]).sum(-1)[..., None], "aten.eq"),
        (lambda x, w, ids: x + torch.tril(w[: x.shape[1]]), "aten.tril"),
        (lambda x, w, ids: x + torch.ones(x.shape[1], 1).triu(), "aten.triu"),
        (lambda x, w, ids: x + torch.matmul(x, w[0])[..., None].mean(1, keepdim=True), "mean"),
    ],
)
def test_tables_and_lengths_that_are_not_read_row_by_row(
    body: Callable[[Tensor, Tensor, Tensor], Tensor], op: str
) -> None:
    rejection = outcome(body)
    assert rejection is not None
    assert rejection.code in ("rows-mixed", "rows-unknown")
    assert op in rejection.text
    assert rejection.source.startswith("test_row_refusals.py:")


@pytest.mark.parametrize(
    "body",
    [
        lambda x, w, ids: x - x.mean(-1, keepdim=True),
        lambda x, w, ids: x.reshape(-1, WIDTH).relu().view(x.shape),
        lambda x, w, ids: x.transpose(0, 1).softmax(-1).transpose(0, 1),
        lambda x, w, ids: (
            x.view(*x.shape[:2], 2, 4)
            .transpose(1, 2)
            .flatten(0, 1)
            .reshape(x.shape[0], 2, x.shape[1], 4)
            .transpose(1, 2)
            .flatten(2)
        ),
        lambda x, w, ids: x + torch.matmul(x, w[0])[..., None],
        lambda x, w, ids: x + torch.zeros(x.shape[0], 1, WIDTH),
        lambda x, w, ids: x.squeeze(-1) + w[:1].expand(x.shape[1], -1),
        lambda x, w, ids: x[:, :, None].squeeze(2) + w[0],
        lambda x, w, ids: x + w[0].softmax(0).cumsum(0),
        lambda x, w, ids: torch.cat([x[..., 4:], x[..., :4]], -1),
    ],
)
def test_ops_that_keep_rows_apart_are_served(
    body: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    assert outcome(body) is None


def _heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], 2, 4).transpose(1, 2)


def test_a_padding_mask_made_from_the_tokens() -> None:
    def body(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        i = torch.arange(ids.shape[1])
        mask = (i[:, None] >= i[None, :])[None, None] & (ids != 0)[:, None, None, :]
        h = _heads(x)
        return sdpa(h, h, h, attn_mask=mask).transpose(1, 2).flatten(2)

    rejection = outcome(body)
    assert rejection is not None
    assert rejection.code == "rows-mixed"
    assert "graphopt.attention" in rejection.text
    assert rejection.source.startswith("test_row_refusals.py:")


def test_a_padding_mask_of_ones() -> None:
    class Padded(Body):
        def forward(self, input_ids: Tensor) -> Tensor:
            h = _heads(self.embed(input_ids))
            ones = torch.ones(input_ids.shape, dtype=torch.int64).to(torch.bool)
            h = torch.ops.graphopt.attention(h, h, h, None, ones, scale=0.5, causal=True)
            return self.head(h.transpose(1, 2).flatten(2))

    graph = capture(Padded(lambda x, w, ids: x).eval(), torch.randint(0, VOCABULARY, (3, 9)))
    PassManager(["insert_kv_cache"]).run(graph, report := Report())
    assert report.rejections("insert_kv_cache") == []
    assert graph.dialect == "serving"


def test_attention_with_heads_among_its_batch_items() -> None:
    def body(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        folded = [_heads(x).flatten(0, 1) * 1.5] * 3
        out = sdpa(*folded, is_causal=True).reshape(x.shape[0], 2, x.shape[1], 4)
        return out.transpose(1, 2).flatten(2)

    refused(body, "batch-mixed", "graphopt.attention")


def test_a_value_read_as_a_number() -> None:
    refused(lambda x, w, ids: x * w[0, 0].item(), "rows-unknown", "item")


def test_one_size_for_batch_and_sequence() -> None:
    graph = capture(
        Body(lambda x, w, ids: x).eval(),
        torch.randint(0, VOCABULARY, (9, 9)),
        dynamic={"input_ids": {0: "n", 1: "n"}},
    )
    PassManager(["insert_kv_cache"]).run(graph, report := Report())
    (rejection,) = report.rejections("insert_kv_cache")
    assert rejection.code == "static-sequence"
