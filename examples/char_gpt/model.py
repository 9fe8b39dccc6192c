"""A small GPT-2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from char_gpt.setting import Setting

__all__ = ["Block", "Gpt"]


class Block(nn.Module):
    """Pre-norm causal attention and a multilayer perceptron with GELU."""

    def __init__(self, s: Setting) -> None:
        super().__init__()
        self.heads = s.heads
        self.norm1, self.norm2 = nn.LayerNorm(s.width), nn.LayerNorm(s.width)
        self.query_key_value, self.out = nn.Linear(s.width, 3 * s.width), nn.Linear(s.width, s.width)
        self.up, self.down = nn.Linear(s.width, 4 * s.width), nn.Linear(4 * s.width, s.width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.query_key_value(self.norm1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """Characters in, logits of the next ones out; learned positions, a head of its own, GPT-2's initial values."""

    positions: Tensor

    def __init__(self, s: Setting, characters: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(characters, s.width), nn.Embedding(s.context, s.width)
        self.blocks = nn.Sequential(*(Block(s) for _ in range(s.layers)))
        self.norm, self.head = nn.LayerNorm(s.width), nn.Linear(s.width, characters, bias=False)
        self.register_buffer("positions", torch.arange(s.context), persistent=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * s.layers) ** 0.5 if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, l) -> (n, l, characters)``."""
        y = self.embedding(x) + self.position(self.positions[: x.shape[1]])
        return self.head(self.norm(self.blocks(y)))
