"""Models and batches of the comparison with other libraries, of growth and of profiles."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from networks import resnet18

CLASSES = 10
VOCABULARY = 65


@dataclass
class Case:
    """A model, a batch, and how the loss reads the output: plainly, or a position a row."""

    model: nn.Module
    x: Tensor
    t: Tensor
    tokens: bool = False

    def loss(self, y: Tensor) -> Tensor:
        """The mean cross-entropy of an output."""
        return F.cross_entropy(y.flatten(0, 1), self.t.flatten()) if self.tokens else F.cross_entropy(y, self.t)

    def double(self) -> Case:
        """The same in float64."""
        x = self.x if self.tokens else self.x.double()
        return Case(self.model.double(), x, self.t, self.tokens)


class Attention(nn.Module):
    """Self-attention and a two-layer network, each after a norm and beside a skip connection."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).movedim(2, 0).transpose(-3, -2)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(h.transpose(-3, -2).flatten(-2))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class Gpt(nn.Module):
    """Blocks of causal attention on characters, with logits of the next one."""

    def __init__(self, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Attention(width, heads, causal=True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        y: Tensor = self.head(self.norm(self.blocks(x)))
        return y


class Vit(nn.Module):
    """ViT-tiny for 32 x 32 images: patches of 4 x 4, the mean over patches, ten classes."""

    def __init__(self, width: int = 192, layers: int = 12, heads: int = 3, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.Sequential(*(Attention(width, heads, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.blocks(self.patches(images).flatten(2).mT)).mean(1))
        return y


def layered(inputs: int, width: int, depth: int = 2) -> nn.Sequential:
    """A multi-layer perceptron: ``depth`` hidden layers of one width."""
    sides = [inputs] + [width] * depth
    hidden = [m for i, o in pairwise(sides) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, CLASSES))


def mlp(width: int, batch: int) -> Case:
    """That of the case study of Osawa et al. 2023, and its relatives."""
    return Case(layered(784, width), torch.randn(batch, 784), torch.randint(CLASSES, (batch,)))


def conv(batch: int) -> Case:
    """Two convolutions on 32 x 32 images."""
    features = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())
    net = nn.Sequential(*features, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2048, CLASSES))
    return Case(net, torch.randn(batch, 3, 32, 32), torch.randint(CLASSES, (batch,)))


def images(make: Callable[[], nn.Module], batch: int) -> Case:
    return Case(make(), torch.randn(batch, 3, 32, 32), torch.randint(CLASSES, (batch,)))


def gpt(width: int, layers: int, length: int, batch: int) -> Case:
    tokens = torch.randint(VOCABULARY, (batch, length + 1))
    return Case(Gpt(width, layers, width // 64, length), tokens[:, :-1].clone(), tokens[:, 1:].clone(), tokens=True)


WORKLOADS: dict[str, tuple[str, Callable[[], Case]]] = {
    **{
        f"mlp{width}" + ("" if batch == 128 else f"-b{batch}"): (
            f"MLP 784-{width}-{width}-10, batch {batch}",
            partial(mlp, width, batch),
        )
        for width in (128, 512, 2048)
        for batch in (128, 32, 512)
    },
    "conv": ("2 convolutions on 32 x 32, batch 32", partial(conv, 32)),
    "gpt2l": ("2-layer GPT, width 256, 16 x 64 tokens", partial(gpt, 256, 2, 64, 16)),
    "gpt6l": ("6-layer GPT, width 384, 8 x 64 tokens", partial(gpt, 384, 6, 64, 8)),
    "vit": ("ViT-tiny for 32 x 32, batch 16", partial(images, Vit, 16)),
    "resnet18": ("ResNet-18 for 32 x 32, batch 16", partial(images, resnet18, 16)),
}
"""By name: what it is, and how it is made."""


def build(name: str, seed: int = 0) -> Case:
    """The same model and batch at every call."""
    torch.manual_seed(seed)
    return WORKLOADS[name][1]()
