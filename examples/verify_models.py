"""Checks K-FAC and its relatives, block by block, on three small networks: ResNet-18 for 32 x 32 images, ViT-tiny and GPT.

    python examples/verify_models.py [--width 16]

Every line compares what a maker captured and solved on one batch with plain autograd and dense matrices in float64. Blocks of
more than 2048 parameters are too large for the dense matrix: give a smaller width to see them all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS
from gradmaker.verify import Verification

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


# ------------------------------------------------------------------ the check
class Subject(NamedTuple):
    """A model in float64 with one batch."""

    model: nn.Module
    x: Tensor
    t: Tensor


def _images(model: nn.Module, examples: int, size: int) -> Subject:
    return Subject(model.double(), torch.randn(examples, 3, size, size).double(), torch.randint(CLASSES, (examples,)))


def _text(width: int, examples: int) -> Subject:
    tokens = torch.randint(11, (examples, 7))
    return Subject(gpt(width, 11, 6).double(), tokens[:, :-1], tokens[:, 1:])


def subjects(width: int) -> dict[str, Callable[[], Subject]]:
    """The three networks. The width of a transformer is a multiple of its heads."""
    return {
        "ResNet-18": lambda: _images(resnet18(width), 4, 32),
        "ViT-tiny": lambda: _images(vit_tiny(3 * max(1, width // 3), 16), 3, 16),
        "GPT": lambda: _text(4 * max(1, width // 4), 3),
    }


def loss(y: Tensor, t: Tensor) -> Tensor:
    """Cross-entropy of images, or of every token."""
    return F.cross_entropy(y.flatten(0, -2), t.flatten())


def check(subject: Subject, method: str) -> Verification:
    """Every block of a method on a subject."""
    maker = METHODS[method](subject.model)
    y = maker.setup_model_call(subject.model, subject.x)
    maker.setup_loss_call(loss, y, subject.t)
    return maker.verify()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=["kfac", "unit_ng"])
    given = parser.parse_args()
    torch.manual_seed(0)
    for name, make in subjects(given.width).items():
        for method in given.methods:
            found = check(make(), method)
            print(f"\n{name}, {method}: {'all blocks ok' if found.passed else 'ABOVE TOLERANCE'}\n{found}")


if __name__ == "__main__":
    main()
