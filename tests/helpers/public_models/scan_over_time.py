"""A recurrent language model: a gated state that runs over the tokens in a Python loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.public_models.sample import Sample, lively


class SelectiveScan(nn.Module):
    def __init__(self, d_inner: int, d_state: int, dt_rank: int) -> None:
        super().__init__()
        self.d_state, self.dt_rank = d_state, dt_rank
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        A = torch.arange(1, d_state + 1).float().repeat(d_inner, 1)
        self.A_log = nn.Parameter(torch.log(A))
        self.D = nn.Parameter(torch.ones(d_inner))

    def forward(self, x: Tensor) -> Tensor:
        b, length, d = x.shape
        A = -torch.exp(self.A_log.float())
        parts = [self.dt_rank, self.d_state, self.d_state]
        delta, B, C = self.x_proj(x).split(parts, dim=-1)
        delta = F.softplus(self.dt_proj(delta))
        deltaA = torch.exp(torch.einsum("bld,dn->bldn", delta, A))
        deltaB_u = torch.einsum("bld,bln,bld->bldn", delta, B, x)
        state = torch.zeros((b, d, self.d_state), device=x.device)
        ys = []
        for i in range(length):
            state = deltaA[:, i] * state + deltaB_u[:, i]
            ys.append(torch.einsum("bdn,bn->bd", state, C[:, i, :]))
        return torch.stack(ys, dim=1) + x * self.D


class Block(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        d_inner = 2 * d_model
        self.norm = nn.RMSNorm(d_model)
        self.in_proj = nn.Linear(d_model, d_inner * 2, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, 3, groups=d_inner, padding=2)
        self.ssm = SelectiveScan(d_inner, d_state=4, dt_rank=2)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        x, res = self.in_proj(self.norm(u)).chunk(2, dim=-1)
        x = self.conv1d(x.transpose(1, 2))[:, :, : u.shape[1]].transpose(1, 2)
        y = self.ssm(F.silu(x)) * F.silu(res)
        return u + self.out_proj(y)


class Recurrent(nn.Module):
    def __init__(self, vocab=40, d_model=8, n_layer=2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, d_model)
        self.layers = nn.ModuleList([Block(d_model) for _ in range(n_layer)])
        self.norm_f = nn.RMSNorm(d_model)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm_f(x) @ self.embedding.weight.T


def build() -> Sample:
    """The loop fixes the length."""
    torch.manual_seed(27)

    def make(batch):
        return (torch.randint(0, 40, (batch, 6)),)

    axes = {"input_ids": {0: "batch"}}
    sizes = make(5), make(1)
    return Sample(lively(Recurrent()), make(2), sizes, "no candidates", "sequence", axes)
