"""The optimizers: torch's AdamW and Muon, and methods of gradmaker, each from one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

import gradmaker
from char_gpt.model import Gpt
from char_gpt.setting import Setting

__all__ = ["ROWS", "Row"]

Build = Callable[[Gpt, float, Setting], list[Optimizer]]
KFAC = {"damping": 0.1, "max_norm": 1.0}
"""Chosen before the search, see the page; with the defaults it diverges."""
ADAM_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


class Row(NamedTuple):
    """A row of the comparison."""

    label: str
    build: Build
    rates: tuple[float, ...] = ADAM_RATES


def adamw(model: Gpt, lr: float, s: Setting) -> list[Optimizer]:
    return [_adamw(list(model.parameters()), lr, s)]


def _adamw(parameters: list[nn.Parameter], lr: float, s: Setting) -> Optimizer:
    return AdamW(parameters, lr, betas=(0.9, s.beta2), weight_decay=s.weight_decay)


def muon(model: Gpt, lr: float, s: Setting) -> list[Optimizer]:
    """Muon for hidden matrices with the step size of AdamW (Liu et al. 2025, arXiv:2502.16982), AdamW for the rest."""
    hidden = [p for p in model.blocks.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in hidden)]
    first = Muon(hidden, lr, momentum=0.95, weight_decay=s.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [first, _adamw(rest, lr, s)]


def front_door(method: str, **options: Any) -> Build:
    """A method with Adam for embeddings, head, norms and biases; its steps have the size of Adam's, with one rate for both."""

    def build(model: Gpt, lr: float, s: Setting) -> list[Optimizer]:
        adam = {"lr": lr, "decay": s.beta2}
        return [gradmaker.optimizer(model, method, lr=lr, weight_decay=s.weight_decay, adam=adam, **options)]

    return build


def kfac(model: Gpt, lr: float, s: Setting) -> list[Optimizer]:
    """K-FAC for all parameters. Its rates are about ten times those of Adam, and the decay is in units of the rate."""
    options = {"weight_decay": s.weight_decay / 10, **KFAC}
    return [gradmaker.optimizer(model, "kfac", lr=lr, **options)]


ROWS = {
    "adamw": Row("torch AdamW", adamw),
    "torch_muon": Row("torch Muon", muon),
    "muon": Row("muon", front_door("muon", scale="rms")),
    "soap": Row("soap", front_door("soap")),
    "shampoo": Row("shampoo", front_door("shampoo", grafting="adam", beta1=0.9)),
    "kfac": Row("kfac", kfac, (0.02, 0.04, 0.08, 0.16, 0.32)),
}
