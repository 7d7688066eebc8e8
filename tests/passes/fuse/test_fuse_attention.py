"""Attention by all three roads; masks proven or kept; everything else rejected with a code."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_block import WIDTH, Attention, code, fuse, the_attention
from helpers.run_graph import CLEANUP, apply, assert_close, run
from helpers.tiny_models import tiny_llama
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphopt
from graphopt.capture import capture
from graphopt.ir.graph import argument
from graphopt.models.reference.bert import BertLike, BertLikeConfig
from graphopt.models.reference.gpt2 import GPT2Like, GPT2LikeConfig
from graphopt.ops import attention

Scores = Callable[[Tensor, Tensor], Tensor]


def iota(q: Tensor) -> tuple[Tensor, Tensor]:
    i = torch.arange(q.shape[2])
    return i[:, None], i[None, :]


def softmax(q: Tensor, k: Tensor, v: Tensor, mask: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH)
    return torch.softmax(mask(scores, q), -1) @ v


NEGATIVE = torch.finfo(torch.float32).min


def by_masked_fill(scores: Tensor, q: Tensor) -> Tensor:
    i, j = iota(q)
    return scores.masked_fill(j > i, float("-inf"))


def by_addition(scores: Tensor, q: Tensor) -> Tensor:
    i, j = iota(q)
    return scores + torch.where(j <= i, 0.0, NEGATIVE)


def by_commuted_addition(scores: Tensor, q: Tensor) -> Tensor:
    i, j = iota(q)
    return torch.where(j > i, NEGATIVE, 0.0) + scores


def by_tril(scores: Tensor, q: Tensor) -> Tensor:
    s = q.shape[2]
    return scores.masked_fill(~torch.ones(s, s, dtype=torch.bool).tril(), NEGATIVE)


TABLE = torch.full((64, 64), NEGATIVE).triu(1)


def by_rows_of_a_table(scores: Tensor, q: Tensor) -> Tensor:
    s = q.shape[2]
    return scores + TABLE.index_select(0, torch.arange(s))[:, :s]


@pytest.mark.parametrize(
    "mask", [by_masked_fill, by_addition, by_commuted_addition, by_tril, by_rows_of_a_table]
)
def test_causal_masks_are_proven_and_gone(mask: Scores) -> None:
    graph, _ = fuse(lambda q, k, v: softmax(q, k, v, mask))
    found = the_attention(graph)
    assert found["causal"]
    assert found["mask"] is None
    assert found["scale"] == pytest.approx(1 / math.sqrt(WIDTH))
    ops = graph.op_counts()
    assert not any(op.startswith(("aten.arange", "aten.where", "aten.tril")) for op in ops)


@pytest.mark.parametrize("window", [1, 3, 6])
def test_windows_are_proven(window: int) -> None:
    def mask(scores: Tensor, q: Tensor) -> Tensor:
        i, j = iota(q)
        return scores.masked_fill((j > i) | (j <= i - window), float("-inf"))

    found = the_attention(fuse(lambda q, k, v: softmax(q, k, v, mask))[0])
    assert (found["causal"], found["window"], found["mask"]) == (True, window, None)


def test_no_mask_is_bidirectional() -> None:
    found = the_attention(fuse(lambda q, k, v: softmax(q, k, v, lambda s, _: s))[0])
    assert not found["causal"]


def hides(condition: Callable[[Tensor, Tensor], Tensor]) -> Scores:
    """A mask that hides the keys j of query i where `condition(i, j)`."""
    return lambda scores, q: scores.masked_fill(condition(*iota(q)), float("-inf"))


@pytest.mark.parametrize(
    ("condition", "predicate"),
    [
        (lambda i, j: j > i + 1, "k <= q + 1"),
        (lambda i, j: j < i, "q <= k"),
        (lambda i, j: (j > i) & (j >= 3), "(k <= q or k <= 2)"),
        (lambda i, j: (j > i) | (i // 4 != j // 4), "k // 4 == q // 4"),
        (lambda i, j: (j > i) | (i % 3 == 1) & (i != j), ""),
    ],
)
def test_other_conditions_become_predicates(
    condition: Callable[[Tensor, Tensor], Tensor], predicate: str
) -> None:
    found = the_attention(fuse(lambda q, k, v: softmax(q, k, v, hides(condition)))[0])
    assert found["mask"] is None
    assert found["predicate"] == predicate if predicate else found["predicate"]
    assert not found["causal"] or predicate in ("", "k // 4 == q // 4")


def test_two_sided_windows() -> None:
    def narrow(i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs() >= 3

    def lopsided(i: Tensor, j: Tensor) -> Tensor:
        return (i - j >= 3) | (j - i >= 5)

    found = the_attention(fuse(lambda q, k, v: softmax(q, k, v, hides(narrow)))[0])
    assert (found["causal"], found["window"], found["predicate"]) == (False, 3, "")
    found = the_attention(fuse(lambda q, k, v: softmax(q, k, v, hides(lopsided)))[0])
    assert not found["causal"]
    assert found["mask"] is None


def test_alibi_is_a_bias_of_indices() -> None:
    def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = iota(q)
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
        bias = slopes * (j - i) + torch.where(j <= i, 0.0, float("-inf"))
        return torch.softmax(q @ k.transpose(2, 3) * 0.3 + bias, -1) @ v

    found = the_attention(fuse(alibi)[0])
    assert found["causal"]
    assert found["mask"] is None
    assert found["bias"] == "aux0[h, 0, 0] * float(k - q)"


def test_a_query_that_may_see_nothing_is_nan_as_in_a_softmax() -> None:
    strict = hides(lambda i, j: (j >= i) & (i > 0))
    (node,) = fuse(lambda q, k, v: softmax(q, k, v, strict))[0].calls(attention.SPEC.overload)
    # Every query sees the first key.
    assert argument(node, "mask") is None
    assert not argument(node, "empty_is_nan")
    nothing = hides(lambda i, j: (j >= i) | (j < 0))
    graph, _ = fuse(lambda q, k, v: softmax(q, k, v, nothing).nan_to_num())
    (node,) = graph.calls(attention.SPEC.overload)
    assert argument(node, "mask") is None
    assert argument(node, "empty_is_nan")


@pytest.mark.parametrize("scaled", ["q", "k", "scores", "mul"])
def test_the_scale_may_stand_anywhere(scaled: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if scaled == "q":
            q = q * 0.25
        if scaled == "k":
            k = k / 4.0
        scores = q @ k.transpose(2, 3)
        if scaled == "scores":
            scores = scores / 4.0
        if scaled == "mul":
            scores = scores * 0.25
        return F.softmax(by_addition(scores, q), -1, dtype=torch.float32).to(q.dtype) @ v

    assert the_attention(fuse(attend)[0])["scale"] == pytest.approx(0.25)


@pytest.mark.parametrize("repeat", ["interleave", "expand"])
def test_repeated_heads_are_read_unrepeated(repeat: str) -> None:
    def again(x: Tensor) -> Tensor:
        if repeat == "interleave":
            return x.repeat_interleave(2, 1)
        b, h, s, d = x.shape
        return x[:, :, None].expand(b, h, 2, s, d).reshape(b, h * 2, s, d)

    graph, _ = fuse(lambda q, k, v: softmax(q, again(k), again(v), by_tril), kv_heads=2)
    (node,) = graph.calls(attention.SPEC.overload)
    assert argument(node, "k_BGTD").meta["val"].shape[1] == 2
    assert argument(node, "v_BGTE").meta["val"].shape[1] == 2


def test_sdpa_causal_flag_and_dense_mask() -> None:
    sdpa = F.scaled_dot_product_attention
    found = the_attention(fuse(lambda q, k, v: sdpa(q, k, v, is_causal=True))[0])
    assert found["causal"]

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = iota(q)
        return sdpa(q, k, v, attn_mask=(j <= i)[None, None], scale=0.3)

    found = the_attention(fuse(masked)[0])
    assert (found["causal"], found["mask"], found["scale"]) == (True, None, 0.3)


def test_rejections_carry_their_codes() -> None:
    def axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(2, 3), 2) @ v

    def probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = torch.softmax(q @ k.transpose(2, 3), -1)
        return p @ v + p.sum(-1, keepdim=True)

    def scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.transpose(2, 3)
        return torch.softmax(s, -1) @ v + s.amax(-1, keepdim=True)

    def dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1) * 0 + v

    def router(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q, -1).topk(2).values.sum(-1, keepdim=True) + v

    assert code(axis) == "softmax-axis"
    assert code(probabilities) == "probabilities-used"
    assert code(scores) == "scores-used"
    assert code(dropout) == "dropout-on"
    assert code(router) == "no-value-product"


def test_the_hook_is_adopted_once_a_layer() -> None:
    graph = capture(tiny_llama(layers=3))
    report = apply(graph, "fuse_attention")
    assert report.sites("fuse_attention") == 3
    assert {site.layer for site in report.passes[0].sites} == {
        f"model.layers.{i}.self_attn" for i in range(3)
    }
    assert apply(graph, "fuse_attention").sites("fuse_attention") == 0


def test_our_gpt2_and_bert() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (2, 13))
    gpt2 = GPT2Like(GPT2LikeConfig()).eval()
    graph = capture(gpt2, ids)
    apply(graph, *CLEANUP, "fuse_attention", "dead_code")
    assert [argument(n, "causal") for n in graph.calls(attention.SPEC.overload)] == [True, True]
    assert_close(run(graph, ids), gpt2(ids))

    bert = BertLike(BertLikeConfig()).eval()
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    graph = capture(bert, (ids, mask))
    apply(graph, *CLEANUP, "fuse_attention", "dead_code")
    calls = graph.calls(attention.SPEC.overload)
    assert [(argument(n, "causal"), argument(n, "mask")) for n in calls] == [(False, None)] * 2
    assert all(argument(n, "pad_BT") is not None for n in calls)
    assert_close(run(graph, ids, mask), bert(ids, mask))


@pytest.mark.parametrize("spelling", ["sdpa", "by hand", "folded heads", "folded, einsum"])
def test_three_axes_can_be_served(spelling: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, s, d = q.shape
        if spelling == "folded heads":
            q, k, v = (x.reshape(b * h, s, d) for x in (q, k, v))
            scores = by_tril(torch.bmm(q, k.transpose(1, 2)) * 0.3, q[None])
            return torch.bmm(scores.softmax(-1), v).view(b, h, s, d)
        if spelling == "folded, einsum":
            q, k, v = (x.reshape(b * h, s, d) for x in (q, k, v))
            scores = by_tril(torch.einsum("b i d, b j d -> b i j", q, k) * 0.3, q[None])
            return torch.einsum("bij,bjd->bid", scores.softmax(-1), v).view(b, h, s, d)
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
        if spelling == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = by_tril(q @ k.mT * 0.3, q[None]).softmax(-1) @ v
        return out.view(b, s, h, d).transpose(1, 2)

    model = Attention(attend).eval()
    ids = torch.randint(0, 50, (2, 9))
    program = graphopt.compile(model, ids, serving="required", expect={"fuse_attention": 1})
    ids = torch.randint(0, 50, (3, 5))
    assert_close(torch.as_tensor(program(ids)), model(ids))


def test_more_keys_than_queries_align_as_written() -> None:
    """is_causal counts from the first key, the op from the last one."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (torch.cat([x[:, :, :1] + 1, x[:, :, :1], x], 2) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    (node,) = fuse(attend)[0].calls(attention.SPEC.overload)
    assert not argument(node, "causal")
    assert argument(node, "predicate") == "k + 2 <= q"


class Packed(nn.Module):
    """Several documents in one row: tokens see the earlier tokens of their own document."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention(lambda q, _k, _v: q)

    def forward(self, input_ids: Tensor, documents: Tensor) -> Tensor:
        q = self.inner(input_ids)[:, None]
        i, j = iota(q)
        same = documents[:, None, :, None] == documents[:, None, None, :]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=same & (j <= i))


def test_packed_documents_are_a_predicate() -> None:
    def some(batch: int, length: int) -> tuple[Tensor, Tensor]:
        documents = torch.randint(0, 2, (batch, length)).cumsum(1)
        return torch.randint(0, 50, (batch, length)), documents

    model = Packed().eval()
    graph = capture(model, some(2, 9))
    apply(graph, *CLEANUP, "fuse_attention", "dead_code")
    found = the_attention(graph)
    assert (found["causal"], found["mask"]) == (True, None)
    assert found["predicate"] == "aux0[b, k] == aux0[b, q]"
    inputs = some(3, 12)
    assert_close(run(graph, *inputs), model(*inputs))


def test_a_square_mask_of_columns_is_no_padding() -> None:
    """It depends on the key alone, but its rows are queries, not batch items."""

    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention(lambda q, _k, _v: q)
            self.register_buffer("seen", torch.rand(64, 64) < 0.7)
            self.seen[:, 0] = True

        def forward(self, input_ids: Tensor) -> Tensor:
            q, s = self.inner(input_ids)[:, None], input_ids.shape[1]
            columns = self.seen[0][:s].expand(s, s)
            dense = F.scaled_dot_product_attention(q, q, q, attn_mask=self.seen[:s, :s])
            return F.scaled_dot_product_attention(q, q, q, attn_mask=columns) + dense

    model = Columns().eval()
    graph = capture(model, torch.randint(0, 50, (2, 9)))
    apply(graph, *CLEANUP, "fuse_attention", "dead_code")
    for node in graph.calls(attention.SPEC.overload):
        mask = argument(node, "mask")
        assert mask is None or mask.meta["val"].shape[-1] != 64
    ids = torch.randint(0, 50, (3, 12))
    assert_close(run(graph, ids), model(ids))


def dot(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(2, 3) * 0.3


def with_sinks(scores: Tensor) -> Tensor:
    sinks = torch.tensor([0.1, 0.7, -0.3, 0.2])[None, :, None, None]
    return torch.cat([scores, sinks.expand(scores.shape[0], -1, scores.shape[2], 1)], -1)


def adds(low: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax(q, k, v, lambda s, q: s + torch.where(iota(q)[1] <= iota(q)[0], 0.0, low))


def fills(hidden: Callable[[Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax(q, k, v, lambda s, q: s.masked_fill(hidden(*iota(q)), -1e9))


def bf16_positions(scores: Tensor, q: Tensor) -> Tensor:
    p = torch.arange(q.shape[2]).float().to(torch.bfloat16)
    return scores.masked_fill(p[None] > p[:, None], -1e9)


@pytest.mark.parametrize(
    ("attend", "rejected"),
    [
        # Additive constants that do not hide.
        (partial(adds, -100.0), ""),
        # Rows that see nothing: a mean in the model, and in the op.
        (partial(fills, lambda i, j: j >= i), ""),
        (partial(fills, lambda i, j: j + 0 * i < 4), ""),
        # Scores that are moved.
        (lambda q, k, v: torch.softmax(dot(k, q).mT, -1) @ v, "not-scores"),
        # What torch broadcasts and the op does not.
        (lambda q, k, v: torch.softmax(dot(q[:, :1], k[:, :1]), -1) @ v, "heads-differ"),
        (lambda q, k, v: torch.softmax(dot(q[:1], k), -1) @ v, "batch-differs"),
        (lambda q, k, v: torch.softmax(dot(q, k[:, :2].repeat_interleave(2, 1)), -1) @ v, ""),
        # Sinks do not get a constant that every score gets.
        (
            lambda q, k, v: torch.softmax(with_sinks(dot(q, k) + 3.0), -1)[..., :-1] @ v,
            "bias-and-sinks",
        ),
        (lambda q, k, v: torch.softmax(with_sinks(dot(q, k)), -1)[..., :-1] @ v, ""),
        # Heads of one batch, put the other way round by the einsum.
        (
            lambda q, k, v: torch.einsum(
                "bij,bjd->bdi", torch.softmax(q[0] @ k[0].mT, -1), v[0]
            ).mT.expand(q.shape[0], -1, -1, -1),
            "no-value-product",
        ),
        # Probabilities that an einsum sums in another way.
        (
            lambda q, k, v: torch.einsum("hst,bhtd->bhsd", torch.softmax(dot(q, k)[0], -1), v),
            "no-value-product",
        ),
    ],
)
def test_what_looks_like_attention(attend: Callable[..., Tensor], rejected: str) -> None:
    graph, report = fuse(attend)
    codes = [r.code for r in report.rejections("fuse_attention")]
    assert codes == ([rejected] if rejected else [])
    assert len(graph.calls(attention.SPEC.overload)) == (0 if rejected else 1)


def test_positions_in_few_bits_are_not_positions() -> None:
    model = Attention(lambda q, k, v: softmax(q, k, v, bf16_positions)).eval()
    graph = capture(model, ids_of(9))
    apply(graph, *CLEANUP, "fuse_attention", "dead_code")
    for node in graph.calls(attention.SPEC.overload):
        assert not argument(node, "causal")
    ids = ids_of(300)
    assert_close(run(graph, ids), model(ids))


@pytest.mark.parametrize("kind", ["equal", "order", "inverted", "weighted"])
def test_numbers_of_documents_are_not_padding_bits(kind: str) -> None:
    class Numbered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention(lambda q, _k, _v: q)

        def forward(self, input_ids: Tensor, numbers: Tensor) -> Tensor:
            q = self.inner(input_ids)[:, None]
            own, other = numbers.float()[:, None, :, None], numbers.float()[:, None, None, :]
            scores = dot(q, q)
            if kind == "equal":
                scores = scores.masked_fill(own != other, -1e9)
            elif kind == "order":
                scores = scores.masked_fill(own < other, -1e9)
            elif kind == "inverted":
                scores = scores + (1.0 - other.clamp(max=1.0)) * -1e9
            else:
                scores = scores + (1.0 - other) * -0.5
            return torch.softmax(scores, -1) @ q

    def some(batch: int, length: int) -> tuple[Tensor, Tensor]:
        numbers = torch.randint(0, 3, (batch, length))
        numbers[:, 0] = 1
        return torch.randint(0, 50, (batch, length)), numbers

    model = Numbered().eval()
    graph = capture(model, some(2, 9))
    apply(graph, *CLEANUP, "fuse_attention", "dead_code")
    inputs = some(3, 12)
    assert_close(run(graph, *inputs), model(*inputs))


class FromData(nn.Module):
    """Who sees whom depends on the token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention(lambda q, _k, _v: q)

    def forward(self, input_ids: Tensor) -> Tensor:
        q = self.inner(input_ids)[:, None]
        order = input_ids.cumsum(1)
        weights = torch.softmax(self.inner.embed(order).sum(-1)[:, None, None] + q @ q.mT, -1)
        return weights @ q


def test_a_bias_from_data_stays_dense_with_its_reason() -> None:
    model = FromData().eval()
    graph = capture(model, torch.randint(0, 4, (2, 7)))
    report = apply(graph, *CLEANUP, "fuse_attention", "dead_code")
    (node,) = graph.calls(attention.SPEC.overload)
    assert argument(node, "mask") is not None
    (site,) = next(record.sites for record in report.passes if record.name == "fuse_attention")
    assert site.remark.startswith("dense mask kept: ")
    ids = torch.randint(0, 4, (3, 5))
    assert_close(run(graph, ids), model(ids))


@pytest.mark.parametrize("strict", [False, True])
def test_both_ways_of_export(strict: bool) -> None:
    model = Attention(lambda q, k, v: softmax(q, k, v, by_tril)).eval()
    graph = capture(model, torch.randint(0, 50, (2, 9)), strict=strict)
    apply(graph, *CLEANUP, "fuse_attention", "dead_code")
    assert the_attention(graph)["causal"]
    ids = torch.randint(0, 50, (3, 5))
    assert_close(run(graph, ids), model(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_that_was_exported_without_us(tmp_path: Path, dtype: torch.dtype) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = by_addition(q @ k.transpose(2, 3) * 0.3, q)
        return F.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v

    model = Attention(attend).eval().to(dtype)
    dims = ({0: torch.export.Dim("b"), 1: torch.export.Dim("s")},)
    exported = torch.export.export(model, (ids_of(9),), dynamic_shapes=dims)
    torch.export.save(exported, tmp_path / "model.pt2")
    graph = capture(torch.export.load(tmp_path / "model.pt2"))
    apply(graph, *CLEANUP, "fuse_attention", "dead_code")
    found = the_attention(graph)
    assert (found["causal"], found["mask"]) == (True, None)
    ids = torch.randint(0, 50, (3, 5))
    assert_close(run(graph, ids), model(ids), 1e-5 if dtype == torch.float32 else 2e-2)


def test_without_a_dense_mask_memory_is_linear_in_the_sequence() -> None:
    class Largest(TorchDispatchMode):
        """Elements of the largest tensor that any op makes."""

        def __init__(self) -> None:
            super().__init__()
            self.numel = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    def largest(length: int) -> int:
        mode = Largest()
        with mode:
            run(graph, torch.randint(0, 50, (2, length)))
        return mode.numel

    def windowed(scores: Tensor, q: Tensor) -> Tensor:
        return hides(lambda i, j: (j > i) | (j <= i - 5))(scores, q)

    graph, _ = fuse(lambda q, k, v: softmax(q, k, v, windowed))
    assert largest(2048) == 2 * largest(1024)
    # Not so before the pass.
    graph = capture(Attention(lambda q, k, v: softmax(q, k, v, windowed)).eval(), ids_of(11))
    assert largest(2048) == 4 * largest(1024)


def ids_of(length: int) -> Tensor:
    return torch.randint(0, 50, (2, length))
