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
from networks import CLASSES, gpt, resnet18, vit_tiny
from torch import Tensor, nn

from gradmaker import METHODS
from gradmaker.reports.verification import Verification


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
