"""A problem that trains in milliseconds."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from torch import Tensor, nn

from gradmaker.compare import Task


def tensors(classes: bool = True) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(120, 6, generator=generator)
    return x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long() if classes else x[:, :2].sum(1, keepdim=True)


def net(outputs: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs))


def toy_task(**options: Any) -> Task:
    x, t = tensors()
    return Task(
        **{"name": "toy", "model": net, "train": (x[:80], t[:80]), "test": (x[80:], t[80:]), "batch_size": 16, **options}
    )


class Killed(torch.optim.SGD):
    """Ends its process as the system does where memory runs out."""

    def step(self, closure: Any = None) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


class Hungry(torch.optim.SGD):
    """Asks for more memory than there is."""

    def step(self, closure: Any = None) -> Any:
        torch.empty(1 << 50)


class Own(torch.optim.SGD):
    """An optimizer that is none of torch's."""
