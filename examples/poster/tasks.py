"""Tasks of the poster beside MLPs: ResNet-18 and ViT-tiny on CIFAR-10, and narrow ones for costs on a CPU.

    gradmaker compare --task examples.poster.tasks:resnet18 --device cuda
    gradmaker cost --config examples/poster/cost_cifar10.yaml

CIFAR-10 comes from the folder that GRADMAKER_DATA names, else from the hub.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from gradmaker.compare import Task
from gradmaker.compare.data import load

sys.path.append(str(Path(__file__).resolve().parents[1]))

from networks import ViT, resnet18 as resnet, vit_tiny as vit

NARROW = 512
"""Random images for costs, whose values do not matter."""


def resnet18() -> Task:
    """ResNet-18 with a stem for 32 x 32."""
    return _cifar10("resnet18", resnet)


def vit_tiny() -> Task:
    """ViT-tiny with patches for 32 x 32."""
    return _cifar10("vit_tiny", vit)


def resnet18_narrow() -> Task:
    """ResNet-18 of an eighth of the width, on random images."""
    return _random("ResNet-18, width 8", partial(resnet, 8))


def vit_narrow() -> Task:
    """Three layers of a quarter of the width of ViT-tiny, on random images."""
    return _random("ViT, width 48, 3 layers", partial(ViT, 48, 3, 3, 32, 4))


def _cifar10(name: str, model: Callable[[], nn.Module]) -> Task:
    data = load("cifar10")
    return Task(
        name=name,
        model=model,
        train=(data.train_inputs, data.train_targets),
        test=(data.test_inputs, data.test_targets),
        batch_size=128,
        options={"budget": "20 epochs"},
    )


def _random(name: str, model: Callable[[], nn.Module]) -> Task:
    x = torch.randn(NARROW, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Task(name=name, model=model, train=(x, torch.arange(NARROW) % 10), batch_size=32)
