"""Three small networks for the examples: ResNet-18 for 32 x 32 images, ViT-tiny and GPT; their width is an argument."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


# ------------------------------------------------------------------ ResNet-18 (He et al. 2016, with a stem for 32 x 32)
class Residual(nn.Module):
    """Two convolutions around a skip connection."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.skip = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(self.first(x)))
        return torch.relu(self.norm2(self.second(h)) + self.skip(x))


def resnet18(width: int = 64) -> nn.Module:
    """Four stages of two blocks; the width doubles, the image halves."""
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    blocks: list[nn.Module] = []
    before = width
    for stage in range(4):
        now = width * 2**stage
        blocks += [Residual(before, now, 1 if stage == 0 else 2), Residual(now, now, 1)]
        before = now
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, CLASSES))


# ------------------------------------------------------------------ transformers
class Layer(nn.Module):
    """Attention and two linear layers, each after a norm and beside a skip connection."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        h, r = self.norm1(x), x.shape[1]
        mask = torch.ones(r, r, dtype=torch.bool, device=x.device).triu(1) if self.causal else None
        x = x + self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        y: Tensor = x + self.shrink(F.gelu(self.grow(self.norm2(x))))
        return y


class ViT(nn.Module):
    """Patches, a class token, learned positions (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int, depth: int, heads: int, image: int, patch: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 1 + (image // patch) ** 2, width) * 0.02)
        self.layers = nn.Sequential(*(Layer(width, heads, False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).mT
        h = torch.cat([self.token.expand(len(x), -1, -1), h], 1) + self.position
        y: Tensor = self.head(self.norm(self.layers(h))[:, 0])
        return y


def vit_tiny(width: int = 192, image: int = 32) -> nn.Module:
    """Twelve layers of three heads."""
    return ViT(width, 12, 3, image, patch=image // 4)


class GPT(nn.Module):
    """Token and position embeddings, causal attention, logits of the next token."""

    def __init__(self, width: int, depth: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Layer(width, heads, True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        index = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        y: Tensor = self.head(self.norm(self.layers(self.token(tokens) + self.position(index))))
        return y


def gpt(width: int = 128, vocabulary: int = 65, length: int = 64) -> nn.Module:
    """Four layers of four heads."""
    return GPT(width, 4, 4, vocabulary, length)
