"""Compile a plain nn.Module with hand-written attention and look at what the passes did."""

import torch
from rich.console import Console

import graphopt
from graphopt.models.reference.llama import LlamaLike, LlamaLikeConfig

model = LlamaLike(LlamaLikeConfig()).eval()
ids = torch.randint(0, 256, (2, 12))

program = graphopt.compile(model, ids, expect={"fuse_attention": 2, "fuse_norm": 5})

Console().print(program.report.table())
error = (program(ids) - model(ids)).abs().max().item()
print(f"largest difference to the model: {error:.1e}")
print(program.generate([1, 2, 3], max_tokens=8)[0].tokens)
