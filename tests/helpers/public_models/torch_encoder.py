"""A language model of nn.TransformerEncoder, sequence first inside, with the mask that torch makes
and sinusoidal positions; log-probabilities are returned."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from helpers.public_models.sample import Sample, lively, tokens_of


class PositionalEncoding(nn.Module):
    def __init__(self, d_model, dropout=0.1, max_len=64):
        super().__init__()
        self.dropout = nn.Dropout(p=dropout)
        pe = torch.zeros(max_len, d_model)
        position = torch.arange(0, max_len, dtype=torch.float).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, d_model, 2).float() * (-math.log(10000.0) / d_model))
        pe[:, 0::2] = torch.sin(position * div_term)
        pe[:, 1::2] = torch.cos(position * div_term)
        self.register_buffer("pe", pe.unsqueeze(0).transpose(0, 1))

    def forward(self, x):
        return self.dropout(x + self.pe[: x.size(0), :])


class TransformerModel(nn.Module):
    def __init__(self, ntoken=41, ninp=16, nhead=2, nhid=24, nlayers=2, dropout=0.2):
        super().__init__()
        self.ninp = ninp
        self.pos_encoder = PositionalEncoding(ninp, dropout)
        layer = nn.TransformerEncoderLayer(ninp, nhead, nhid, dropout)
        self.transformer_encoder = nn.TransformerEncoder(layer, nlayers, enable_nested_tensor=False)
        self.encoder = nn.Embedding(ntoken, ninp)
        self.decoder = nn.Linear(ninp, ntoken)

    def forward(self, src):
        src = src.transpose(0, 1)
        src_mask = nn.Transformer.generate_square_subsequent_mask(src.size(0)).to(src.device)
        x = self.pos_encoder(self.encoder(src) * math.sqrt(self.ninp))
        output = self.decoder(self.transformer_encoder(x, src_mask))
        return F.log_softmax(output, dim=-1).transpose(0, 1)


def build() -> Sample:
    """Greedy tokens of log-probabilities are those of logits."""
    torch.manual_seed(12)
    make = tokens_of(41)
    model = lively(TransformerModel())
    return Sample(model, make(2, 12), (make(3, 17), make(1, 5)), "2 of 2 fused")
