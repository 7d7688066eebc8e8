"""A decoder whose mask is the logarithm of a band of ones: 0 where visible, -inf elsewhere."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from helpers.public_models.sample import Sample, lively, tokens_of


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.repeats = args["n_heads"] // args["n_kv_heads"]
        self.scale = args["head_dim"] ** -0.5
        self.wq = nn.Linear(args["dim"], args["n_heads"] * args["head_dim"], bias=False)
        self.wk = nn.Linear(args["dim"], args["n_kv_heads"] * args["head_dim"], bias=False)
        self.wv = nn.Linear(args["dim"], args["n_kv_heads"] * args["head_dim"], bias=False)
        self.wo = nn.Linear(args["n_heads"] * args["head_dim"], args["dim"], bias=False)

    def forward(self, x, mask):
        bsz, seqlen, _ = x.shape
        xq, xk, xv = self.wq(x), self.wk(x), self.wv(x)
        xq = xq.view(bsz, seqlen, self.args["n_heads"], self.args["head_dim"])
        xk = xk.view(bsz, seqlen, self.args["n_kv_heads"], self.args["head_dim"])
        xv = xv.view(bsz, seqlen, self.args["n_kv_heads"], self.args["head_dim"])
        key = torch.repeat_interleave(xk, repeats=self.repeats, dim=2)
        value = torch.repeat_interleave(xv, repeats=self.repeats, dim=2)
        query, key, value = xq.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        scores = torch.matmul(query, key.transpose(2, 3)) * self.scale
        scores += mask[None, None, ...]
        scores = nn.functional.softmax(scores.float(), dim=-1).type_as(query)
        output = torch.matmul(scores, value)
        return self.wo(output.transpose(1, 2).contiguous().view(bsz, seqlen, -1))


class Block(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.attention = Attention(args)
        self.w1 = nn.Linear(args["dim"], args["hidden_dim"], bias=False)
        self.w2 = nn.Linear(args["hidden_dim"], args["dim"], bias=False)
        self.w3 = nn.Linear(args["dim"], args["hidden_dim"], bias=False)
        self.attention_norm = nn.RMSNorm(args["dim"], eps=1e-5)
        self.ffn_norm = nn.RMSNorm(args["dim"], eps=1e-5)

    def forward(self, x, mask):
        h = x + self.attention.forward(self.attention_norm(x), mask)
        r = self.ffn_norm(h)
        return h + self.w2(F.silu(self.w1(r)) * self.w3(r))


class Transformer(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args["vocab_size"], args["dim"])
        self.layers = nn.ModuleList([Block(args) for _ in range(args["n_layers"])])
        self.norm = nn.RMSNorm(args["dim"], eps=1e-5)
        self.output = nn.Linear(args["dim"], args["vocab_size"], bias=False)

    def forward(self, input_ids):
        h = self.tok_embeddings(input_ids)
        seqlen = input_ids.shape[1]
        tensor = torch.full((seqlen, seqlen), dtype=h.dtype, fill_value=1, device=h.device)
        mask = torch.tril(tensor, diagonal=0).to(h.dtype)
        mask = torch.triu(mask, diagonal=-self.args["sliding_window"])
        mask = torch.log(mask)
        for layer in self.layers:
            h = layer(h, mask)
        return self.output(self.norm(h)).float()


def build() -> Sample:
    """A window of 4 keys before the query."""
    torch.manual_seed(6)
    make = tokens_of(49)
    args = {"dim": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "hidden_dim": 48}
    args |= {"n_layers": 2, "vocab_size": 49, "sliding_window": 4}
    model = lively(Transformer(args))
    return Sample(model, make(2, 12), (make(3, 17), make(1, 5)), "2 of 2 fused")
