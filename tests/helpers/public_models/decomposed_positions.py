"""A vision block with relative positions decomposed into rows and columns, which depend on the
queries; the heads are folded into the batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from helpers.public_models.sample import Sample, lively


def get_rel_pos(q_size: int, k_size: int, rel_pos: Tensor) -> Tensor:
    """The rows of the table for every pair of places: [q_size, k_size, D]."""
    q_coords = torch.arange(q_size)[:, None] * max(k_size / q_size, 1.0)
    k_coords = torch.arange(k_size)[None, :] * max(q_size / k_size, 1.0)
    relative_coords = (q_coords - k_coords) + (k_size - 1) * max(q_size / k_size, 1.0)
    return rel_pos[relative_coords.long()]


def add_decomposed_rel_pos(
    attn: Tensor, q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, size: tuple[int, int]
) -> Tensor:
    height, width = size
    Rh = get_rel_pos(height, height, rel_pos_h)
    Rw = get_rel_pos(width, width, rel_pos_w)
    B, _, dim = q.shape
    r_q = q.reshape(B, height, width, dim)
    rel_h = torch.einsum("bhwc,hkc->bhwk", r_q, Rh)
    rel_w = torch.einsum("bhwc,wkc->bhwk", r_q, Rw)
    attn = (
        attn.view(B, height, width, height, width)
        + rel_h[:, :, :, :, None]
        + rel_w[:, :, :, None, :]
    )
    return attn.view(B, height * width, height * width)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, input_size: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = dim // num_heads
        self.scale = head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * input_size[0] - 1, head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * input_size[1] - 1, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, B * self.num_heads, H * W, -1).unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = add_decomposed_rel_pos(attn, q, self.rel_pos_h, self.rel_pos_w, (H, W))
        attn = attn.softmax(dim=-1)
        x = (attn @ v).view(B, self.num_heads, H, W, -1).permute(0, 2, 3, 1, 4).reshape(B, H, W, -1)
        return self.proj(x)


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, input_size: tuple[int, int]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, input_size)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def build() -> Sample:
    """Grids of 3 x 4, any batch."""
    torch.manual_seed(23)

    def make(batch):
        return (torch.randn(batch, 3, 4, 16),)

    model = lively(nn.Sequential(Block(16, 2, (3, 4)), Block(16, 2, (3, 4))))
    return Sample(model, make(2), (make(5), make(1)), "2 of 2 fused", "token ids")
