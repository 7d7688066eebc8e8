"""A decoder that alternates whole and local attention, masked by torch.where with a tensor of the
lowest value; no scale."""

from __future__ import annotations

import torch
from torch import nn

from helpers.public_models.sample import Sample, lively, tokens_of


class SelfAttention(nn.Module):
    def __init__(self, hidden_size, num_heads, attention_type, max_positions=64, window_size=4):
        super().__init__()
        bias = torch.tril(torch.ones((max_positions, max_positions), dtype=bool)).view(
            1, 1, max_positions, max_positions
        )
        if attention_type == "local":
            bias = torch.bitwise_xor(bias, torch.tril(bias, -window_size))
        self.register_buffer("bias", bias, persistent=False)
        self.embed_dim, self.num_heads = hidden_size, num_heads
        self.head_dim = hidden_size // num_heads
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.1), nn.Dropout(0.1)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=True)

    def _split_heads(self, tensor):
        new_shape = (*tensor.size()[:-1], self.num_heads, self.head_dim)
        return tensor.view(new_shape).permute(0, 2, 1, 3)

    def _merge_heads(self, tensor):
        tensor = tensor.permute(0, 2, 1, 3).contiguous()
        return tensor.view((*tensor.size()[:-2], self.embed_dim))

    def forward(self, hidden_states):
        query = self._split_heads(self.q_proj(hidden_states)).to(torch.float32)
        key = self._split_heads(self.k_proj(hidden_states)).to(torch.float32)
        value = self._split_heads(self.v_proj(hidden_states))
        attn_weights = torch.matmul(query, key.transpose(-1, -2))
        query_length, key_length = query.size(-2), key.size(-2)
        causal_mask = self.bias[:, :, key_length - query_length : key_length, :key_length]
        mask_value = torch.finfo(attn_weights.dtype).min
        mask_value = torch.tensor(mask_value, dtype=attn_weights.dtype).to(attn_weights.device)
        attn_weights = torch.where(causal_mask, attn_weights, mask_value)
        attn_weights = nn.functional.softmax(attn_weights, dim=-1).to(value.dtype)
        attn_output = self._merge_heads(torch.matmul(self.attn_dropout(attn_weights), value))
        return self.resid_dropout(self.out_proj(attn_output))


class Block(nn.Module):
    def __init__(self, hidden_size, num_heads, attention_type):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.attn = SelfAttention(hidden_size, num_heads, attention_type)
        self.c_fc = nn.Linear(hidden_size, 4 * hidden_size)
        self.c_proj = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states))
        x = self.c_fc(self.ln_2(hidden_states))
        x = 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0))))
        return hidden_states + self.c_proj(x)


class LanguageModel(nn.Module):
    def __init__(self, vocab_size=43, hidden_size=16, num_heads=2, layers=("global", "local")):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, hidden_size)
        self.wpe = nn.Embedding(64, hidden_size)
        self.h = nn.ModuleList([Block(hidden_size, num_heads, kind) for kind in layers])
        self.ln_f = nn.LayerNorm(hidden_size)

    def forward(self, input_ids):
        position_ids = torch.arange(input_ids.shape[-1], device=input_ids.device).unsqueeze(0)
        hidden_states = self.wte(input_ids) + self.wpe(position_ids)
        for block in self.h:
            hidden_states = block(hidden_states)
        return nn.functional.linear(self.ln_f(hidden_states), self.wte.weight)


def build() -> Sample:
    """A local layer sees four keys with its own."""
    torch.manual_seed(62)
    make = tokens_of(43)
    model = lively(LanguageModel())
    return Sample(model, make(2, 12), (make(3, 17), make(1, 5)), "2 of 2 fused")
