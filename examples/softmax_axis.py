"""A softmax over the wrong axis is no attention: what a compiler should say about this program.

python examples/softmax_axis.py              what graphopt says
python examples/softmax_axis.py --inductor   and what torch.compile computes (needs a compiler)
"""

import sys

import torch

import graphopt


class Weighted(torch.nn.Module):
    def forward(self, q, k, v):
        scores = q @ k.transpose(-2, -1) * 8**-0.5
        weights = scores.softmax(dim=1)  # over the heads, not over the keys
        return weights @ v


torch.manual_seed(0)
model, qkv = Weighted().eval(), torch.randn(3, 2, 4, 16, 8).unbind(0)
with torch.no_grad():
    expected = model(*qkv)


def error(found: torch.Tensor) -> str:
    """Relative to the largest value."""
    return f"{float((found - expected).abs().max() / expected.abs().max()):.2g}"


program = graphopt.compile(model, qkv, dynamic=False, backend="reference", serving="off")
print(graphopt.explain(program, "fuse_attention"))
print("graphopt: relative error", error(program(*qkv)))
if "--inductor" in sys.argv:
    with torch.no_grad():
        print("torch.compile: relative error", error(torch.compile(model)(*qkv)))
