"""Shapes of large models for `gradmaker cost --task`: nothing is trained here, and no number of a model is held.

    gradmaker cost --task examples.large_shapes:llama_7b kfac shampoo soap --world 64 --mesh 8x8 --memory 24

`gradmaker cost` calls the function on torch's meta device, plans each method for the model, and says what a rank holds,
computes and communicates. A task returns a model and the batch of one rank. See docs/scale.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A transformer block with the matrices of Llama (Touvron et al. 2023, arXiv:2302.13971); without rotations."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """The block.  # (B, T, width)"""
        y = self.norms[0](x)
        q, k, v = (m(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def llama(vocabulary: int, width: int, hidden: int, heads: int, layers: int) -> nn.Module:
    """A decoder with tables that are not tied."""
    blocks = [Block(width, hidden, heads) for _ in range(layers)]
    head = nn.Linear(width, vocabulary, bias=False)
    return nn.Sequential(nn.Embedding(vocabulary, width), *blocks, nn.RMSNorm(width), head)


def llama_7b() -> tuple[nn.Module, Tensor]:
    """6.7 billion parameters; a rank has one sequence of 2048 tokens."""
    return llama(32000, 4096, 11008, 32, 32), torch.zeros(1, 2048, dtype=torch.long)


def gpt2_small() -> tuple[nn.Module, Tensor]:
    """The widths of GPT-2 small in the same blocks; a rank has four sequences of 1024 tokens."""
    return llama(50257, 768, 2048, 12, 12), torch.zeros(4, 1024, dtype=torch.long)
