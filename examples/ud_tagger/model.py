"""A transformer encoder that tags words."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ud_tagger.setting import Setting
from ud_tagger.treebank import PAD

__all__ = ["Layer", "Tagger"]


class Layer(nn.Module):
    """Pre-norm attention (no biases in queries, keys and values) and a multilayer perceptron with ELU."""

    def __init__(self, s: Setting) -> None:
        super().__init__()
        self.heads, self.p = s.heads, s.dropout
        self.norm1, self.norm2 = nn.LayerNorm(s.width), nn.LayerNorm(s.width)
        self.query, self.key, self.value = (nn.Linear(s.width, s.width, bias=False) for _ in range(3))
        self.out = nn.Linear(s.width, s.width)
        self.up, self.down = nn.Linear(s.width, s.hidden), nn.Linear(s.hidden, s.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, mask, self.p if self.training else 0.0).transpose(1, 2).flatten(2)
        x = x + self.drop(self.out(y))
        return x + self.drop(self.down(self.drop(F.elu(self.up(self.norm2(x))))))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)


class Tagger(nn.Module):
    """Words in, tag logits out; positions are sinusoids."""

    positions: Tensor

    def __init__(self, s: Setting, words: int, tags: int) -> None:
        super().__init__()
        self.p = s.dropout
        self.embedding = nn.Embedding(words, s.width)
        nn.init.normal_(self.embedding.weight, std=s.width**-0.5)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm, self.head = nn.LayerNorm(s.width), nn.Linear(s.width, tags)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        angles = torch.arange(s.length)[:, None] * 10000.0 ** (-torch.arange(0, s.width, 2) / s.width)
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], 1) * s.width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, l) -> (n, l, tags)``."""
        mask = (x != PAD)[:, None, None, :]
        y = F.dropout(self.embedding(x) + self.positions[: x.shape[1]], self.p, self.training)
        for layer in self.layers:
            y = layer(y, mask)
        return self.head(self.norm(y))
