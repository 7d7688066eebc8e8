"""Small random Hugging Face models and plain modules that several tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(layers: int = 2, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A random Llama: hidden 64, 4 heads, 2 KV heads, 101 tokens."""
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 101,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).eval()
    # Norm weights of one would hide a norm that ignores its weight.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


class CausalConvolution(nn.Module):
    """A language model whose rows see their neighbours through a convolution."""

    def __init__(self, width: int = 16, vocabulary: int = 31) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.conv = nn.Conv1d(width, width, 3)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        x_BDS = self.embed(input_ids).transpose(1, 2)
        x_BDS = nn.functional.pad(x_BDS, (2, 0))
        return self.head(self.conv(x_BDS).transpose(1, 2))
