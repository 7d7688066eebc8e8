"""Attention as people write it by hand: scales, masks, biases and folded heads in tensors.

Each spelling is fused and equal to the model at a second size, or left alone with its code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import pytest
import torch
from helpers.run_graph import CLEANUP, apply, assert_close, run
from torch import Tensor, fx, nn

from graphopt.capture import capture
from graphopt.codegen.reference import ReferenceBackend
from graphopt.ir.graph import Graph, argument
from graphopt.ops import attention
from graphopt.record.report import Report

HEADS, WIDTH = 4, 8
LOW = torch.finfo(torch.float32).min
Attend = Callable[["Model", Tensor, Tensor, Tensor, Tensor], Tensor]


class Model(nn.Module):
    """`attend(self, q, k, v, pad)` of `[B, H, S, D]` heads; pad `[B, S]` is 1 where a token is."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.embed, self.qkv = nn.Embedding(50, HEADS * WIDTH), nn.Linear(32, 96)
        self.plain = torch.sqrt(torch.FloatTensor([WIDTH]))
        self.register_buffer("one", torch.tensor([8**-0.5]))
        self.register_buffer("fill", torch.tensor(-1e9))
        self.register_buffer("lower", torch.ones(1, 1, 32, 32).tril())
        band = torch.ones(32, 32, dtype=torch.uint8).tril()
        self.register_buffer("band", band - band.tril(-3))
        self.learned = nn.Parameter(torch.tensor([0.7]))
        self.by_head = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)

    def forward(self, ids: Tensor, pad: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
            for t in self.qkv(self.embed(ids) * 2).chunk(3, -1)
        )
        return self.attend(self, q, k, v, pad)


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Token ids, and padding on the right of some rows and on the left of others."""
    pad = torch.ones(batch, length, dtype=torch.int64)
    pad[0, length - 2 :] = 0
    pad[1, :1] = 0
    return torch.randint(0, 50, (batch, length)), pad


def fuse(attend: Attend, *passes: str) -> tuple[Graph, Report, Model]:
    """Captured at one size, fused, compared with the model at two others."""
    torch.manual_seed(0)
    model = Model(attend).eval()
    graph = capture(model, inputs(2, 9))
    report = apply(graph, *(passes or CLEANUP), "fuse_attention", "dead_code")
    for size in ((3, 13), (2, 5)):
        given = inputs(*size)
        with torch.no_grad():
            assert_close(run(graph, *given), model(*given))
    return graph, report, model


def softmax(scores: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores, -1) @ v


def seen(q: Tensor) -> Tensor:
    return torch.ones(q.shape[2], q.shape[2]).tril()


def causal_after(scale: Callable[[Model, Tensor], Tensor]) -> Attend:
    return lambda m, q, k, v, _: softmax(scale(m, q @ k.mT).masked_fill(seen(q) == 0, -math.inf), v)


class Many(nn.Module):
    """Several spellings in one graph, one layer each."""

    def __init__(self, attends: Iterable[Attend]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(map(Model, attends))

    def forward(self, ids: Tensor, pad: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(ids, pad) for part in self.parts)


def fuse_all(attends: Mapping[str, Attend]) -> tuple[dict[str, fx.Node], dict[str, str]]:
    """Name -> the attention that it became, and name -> the code of its rejection."""
    torch.manual_seed(0)
    model = Many(attends.values()).eval()
    graph = capture(model, inputs(2, 9))
    report = apply(graph, *CLEANUP, "fuse_attention", "dead_code")
    for size in ((3, 13), (2, 5)):
        given = inputs(*size)
        with torch.no_grad():
            wanted = model(*given)
        for ours, theirs in zip(ReferenceBackend().lower(graph)(*given), wanted, strict=True):
            assert_close(ours, theirs)
    layers = {f"parts.{i}": name for i, name in enumerate(attends)}
    fused = {layers[n.meta["layer"]]: n for n in graph.calls(attention.SPEC.overload)}
    codes = {layers[r.layer]: r.code for r in report.rejections("fuse_attention")}
    assert fused.keys() | codes.keys() == attends.keys()
    return fused, codes


SCALES: dict[str, tuple[Callable[[Model, Tensor], Tensor], float]] = {
    "a plain tensor attribute": (lambda m, s: s / m.plain, 8**-0.5),
    "a buffer of one element": (lambda m, s: s * m.one, 8**-0.5),
    "a parameter of one element": (lambda m, s: s * m.learned, 0.7),
    "a root taken in forward": (lambda _m, s: s / torch.sqrt(torch.tensor(8.0)), 8**-0.5),
    "a power": (lambda _m, s: s * torch.tensor(8) ** -0.5, 8**-0.5),
    "exp of a parameter": (lambda m, s: s * m.learned.clamp(max=0.5).exp(), math.exp(0.5)),
}


def test_a_scale_in_a_tensor_is_a_number() -> None:
    fused, _ = fuse_all({name: causal_after(scale) for name, (scale, _) in SCALES.items()})
    for name, (_, expected) in SCALES.items():
        assert argument(fused[name], "scale") == pytest.approx(expected), name
        assert (argument(fused[name], "causal"), argument(fused[name], "mask")) == (True, None)


def test_a_scale_of_each_head_goes_to_the_queries() -> None:
    fused, _ = fuse_all(
        {
            "mul": causal_after(lambda m, s: s * m.by_head.exp()),
            "div": causal_after(lambda m, s: s / m.by_head),
        }
    )
    for op, node in fused.items():
        assert argument(node, "causal")
        assert argument(node, "q_BHSD").target is getattr(torch.ops.aten, op).Tensor


MASKS: dict[str, tuple[Callable[[Model, Tensor, Tensor], Tensor], int]] = {
    "a fill in a tensor": (lambda _m, s, q: torch.where(seen(q) > 0, s, torch.tensor(LOW)), 0),
    "a fill in a buffer": (lambda m, s, q: torch.where(seen(q).bool(), s, m.fill), 0),
    "a full tensor": (lambda _m, s, q: torch.where(seen(q) == 1, s, torch.full_like(s, LOW)), 0),
    "a filling tensor": (lambda m, s, q: s.masked_fill(seen(q) == 0, m.fill), 0),
    "in place": (lambda _m, s, q: s.masked_fill_(torch.ones_like(seen(q)).triu(1) > 0, -1e9), 0),
    "a logarithm": (lambda _m, s, q: s + seen(q).log(), 0),
    "a logarithm of a band": (lambda _m, s, q: s + seen(q).triu(-2).log()[None, None], 3),
    "a buffer that is cut": (
        lambda m, s, q: s.masked_fill(m.lower[..., : q.shape[2], : q.shape[2]] == 0, -1e9),
        0,
    ),
    "a band in bytes": (
        lambda m, s, q: s.masked_fill(m.band[: q.shape[2], : q.shape[2]] == 0, -1e9),
        3,
    ),
    "a bound below": (
        lambda _m, s, q: torch.max(s + (1 - seen(q)) * LOW, torch.full((), LOW)),
        0,
    ),
    "a clamp": (lambda _m, s, q: (s + (1 - seen(q)) * LOW).clamp(min=LOW), 0),
}


def masked_by(mask: Callable[[Model, Tensor, Tensor], Tensor]) -> Attend:
    return lambda m, q, k, v, _: softmax(mask(m, q @ k.mT * 0.3, q), v)


def test_a_mask_through_tensors_is_proven() -> None:
    fused, _ = fuse_all({name: masked_by(mask) for name, (mask, _) in MASKS.items()})
    for name, (_, window) in MASKS.items():
        found = tuple(argument(fused[name], x) for x in ("causal", "window", "mask", "bias"))
        assert found == (True, window, None, ""), name


PADDING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "added": lambda s, pad: s + (1.0 - pad[:, None, None, :].float()) * LOW,
    "added after a cast": lambda s, pad: s + (1 - pad)[:, None, None, :] * -1e9,
    "a logarithm": lambda s, pad: s + pad[:, None, None, :].log(),
    "what is hidden": lambda s, pad: s.masked_fill((pad == 0)[:, None, None, :], -math.inf),
}


def padded_by(mask: Callable[[Tensor, Tensor], Tensor]) -> Attend:
    return lambda _m, q, k, v, pad: softmax(mask(q @ k.mT * 0.3, pad), v)


def test_padding_becomes_the_padding_operand() -> None:
    fused, _ = fuse_all({name: padded_by(mask) for name, mask in PADDING.items()})
    for name in PADDING:
        assert argument(fused[name], "pad_BT") is not None, name
        assert (argument(fused[name], "mask"), argument(fused[name], "bias")) == (None, "")


def softmax_of(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1)


def folded(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0] * HEADS, x.shape[2], x.shape[3])


def alibi_by_baddbmm(_: Model, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """Bloom: positions by a cumulative sum of the mask, added by the product itself."""
    slopes = 2.0 ** -torch.arange(1.0, HEADS + 1)
    places = ((pad.cumsum(-1) - 1) * pad)[:, None]
    alibi = (slopes[:, None] * places).reshape(-1, 1, q.shape[2])
    scores = alibi.baddbmm(folded(q), folded(k).mT, beta=0.5, alpha=0.3)
    scores = scores.view(q.shape[0], HEADS, q.shape[2], -1) + seen(q).log()
    return (torch.bmm(folded(softmax_of(scores)), folded(v))).view(*q.shape)


def test_what_baddbmm_adds_is_a_bias() -> None:
    graph, _, _ = fuse(alibi_by_baddbmm)
    (node,) = graph.calls(attention.SPEC.overload)
    assert (argument(node, "causal"), argument(node, "mask")) == (True, None)
    assert argument(node, "bias")
    assert argument(node, "scale") == pytest.approx(0.3)


@pytest.mark.parametrize("swapped", [False, True])
def test_decomposed_positions_of_folded_heads_are_a_dense_bias(swapped: bool) -> None:
    """The bias is a product too, and no node holds it in the shape of heads."""

    def attend(m: Model, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        flat = [folded(x) for x in (q, k, v)]
        table = m.qkv.weight[: q.shape[2], :WIDTH]
        bias = torch.einsum("bnc,kc->bnk", flat[0], table)
        scores = flat[0] @ flat[1].mT * 0.3
        scores = bias + scores if swapped else scores + bias
        return (softmax_of(scores) @ flat[2]).view(*q.shape)

    graph, report, _ = fuse(attend)
    (node,) = graph.calls(attention.SPEC.overload)
    mask = argument(node, "mask")
    assert mask is not None
    assert len(mask.meta["val"].shape) == 4
    (site,) = next(record.sites for record in report.passes if record.name == "fuse_attention")
    assert site.remark.startswith("dense mask kept: bias-not-a-tensor")
    # The product itself is gone.
    assert not graph.calls(torch.ops.aten.matmul.default)


def test_a_window_mask_over_five_axes() -> None:
    """Swin: windows in the batch, a table for heads and a mask for windows."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)
            self.table = nn.Parameter(torch.randn(2, 4, 4))
            self.register_buffer("mask", torch.randn(3, 4, 4).sign().clamp(max=0) * 100)

        def forward(self, x: Tensor) -> Tensor:
            b, n, _ = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
            scores = q @ k.mT * 0.3 + self.table
            scores = scores.view(b // 3, 3, 2, n, n) + self.mask[None, :, None]
            return softmax_of(scores.view(-1, 2, n, n)) @ v

    torch.manual_seed(0)
    for batch in (3, 6):
        model, x = Windows().eval(), torch.randn(batch, 4, 16)
        graph = capture(model, x, dynamic=False)
        apply(graph, *CLEANUP, "fuse_attention", "dead_code")
        assert len(graph.calls(attention.SPEC.overload)) == 1
        with torch.no_grad():
            assert_close(run(graph, x), model(x))


@pytest.mark.parametrize(
    ("how", "batch_first"),
    [("none", True), ("padding", False), ("both", True), ("float", False), ("unweighted", True)],
)
def test_multihead_attention_of_torch(how: str, batch_first: bool) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 32)
            self.attn = nn.MultiheadAttention(32, HEADS, batch_first=batch_first)

        def forward(self, ids: Tensor, pad: Tensor) -> Tensor:
            x = self.embed(ids) if batch_first else self.embed(ids).transpose(0, 1)
            n = ids.shape[1]
            hidden = pad == 0 if how in ("padding", "both", "unweighted") else None
            mask = None
            if how in ("causal", "both"):
                mask = torch.ones(n, n, dtype=torch.bool).triu(1)
            elif how in ("float", "unweighted"):
                mask = torch.full((n, n), -1e9).triu(1)
                hidden = (
                    None if hidden is None else torch.zeros(ids.shape).masked_fill(hidden, -1e9)
                )
            y, _ = self.attn(
                x, x, x, key_padding_mask=hidden, attn_mask=mask, need_weights=how != "unweighted"
            )
            return y if batch_first else y.transpose(0, 1)

    torch.manual_seed(0)
    model = Layer().eval().requires_grad_(False)
    graph = capture(model, inputs(2, 9))
    apply(graph, *CLEANUP, "fuse_attention", "dead_code")
    (node,) = graph.calls(attention.SPEC.overload)
    assert argument(node, "causal") == (how in ("causal", "both", "float", "unweighted"))
    assert (argument(node, "pad_BT") is None) == (how in ("none", "causal", "float"))
    assert argument(node, "mask") is None
    for size in ((3, 13), (2, 5)):
        ids, pad = inputs(*size)
        pad[:, 0] = 1
        with torch.no_grad():
            assert_close(run(graph, ids, pad), model(ids, pad))
    assert torch.backends.mha.get_fastpath_enabled()


REFUSED: dict[str, tuple[Attend, str]] = {
    "a bound that scores reach": (
        lambda _m, q, k, v, _p: softmax((q @ k.mT).clamp(-1, 1), v),
        "not-scores",
    ),
    "a factor of the keys": (
        lambda _m, q, k, v, p: softmax(q @ k.mT * p[:, None, None, :].float(), v),
        "scale-by-data",
    ),
    "a factor of masked scores": (
        lambda m, q, k, v, _p: softmax((q @ k.mT + seen(q).log()) * m.by_head, v),
        "not-scores",
    ),
    "heads that talk": (
        lambda m, q, k, v, _p: softmax(
            torch.einsum("bhqk,hg->bgqk", q @ k.mT, m.qkv.weight[:HEADS, :HEADS]), v
        ),
        "not-heads",
    ),
    "a filled number that hides nothing": (
        lambda _m, q, k, v, _p: softmax((q @ k.mT).masked_fill(seen(q) == 0, -5.0), v),
        "masked-fill",
    ),
    "softmax over the queries": (
        lambda _m, q, k, v, _p: torch.softmax(q @ k.mT, -2) @ v,
        "softmax-axis",
    ),
    "a scale by the scores": (
        lambda _m, q, k, v, _p: softmax(3.0 / (q @ k.mT + 90.0), v),
        "not-scores",
    ),
}


def test_what_is_no_attention_keeps_its_ops() -> None:
    fused, codes = fuse_all({name: attend for name, (attend, _) in REFUSED.items()})
    assert not fused
    assert codes == {name: code for name, (_, code) in REFUSED.items()}


def test_copies_of_operands_are_looked_through() -> None:
    """Without cleanup, which would have removed them."""

    def attend(_m: Model, q: Tensor, k: Tensor, v: Tensor, _p: Tensor) -> Tensor:
        q, k, v = (x.clone(memory_format=torch.contiguous_format) for x in (q * 0.3, k, v))
        return softmax((q @ k.mT.clone()).clone(), v)

    graph, _, _ = fuse(attend, "drop_asserts")
    (node,) = graph.calls(attention.SPEC.overload)
    assert argument(node, "scale") == pytest.approx(0.3)
