"""AdamW, and Shampoo and CASPR with everything else as in AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from gradmaker import (
    CasprGradientConfig,
    CasprGradientMaker,
    GradientMaker,
    ShampooGradientConfig,
    ShampooGradientMaker,
    Triple,
)
from gradmaker.capture.sites import Site
from gradmaker.curvature import BatchGradient
from gradmaker.representations import Diagonal
from gradmaker.solvers import Division
from ud_tagger.setting import Point, Setting

__all__ = ["METHODS", "DecoupledSGD"]

Pair: TypeAlias = tuple[GradientMaker, torch.optim.Optimizer]


def _on_matrices(triple: Triple | None, site: Site) -> Triple | None:
    """Biases and scales take Adam's step, as in the code of CASPR; here as a choice of parts."""
    return triple if len(site.shape) > 2 else Triple(BatchGradient(), Diagonal(), Division(power=-0.5, damping=1e-8))


@dataclass(frozen=True, kw_only=True)
class MatrixShampooConfig(ShampooGradientConfig):
    """Shampoo for matrices, Adam for vectors."""

    def triple(self, site: Site) -> Triple | None:
        return _on_matrices(super().triple(site), site)


@dataclass(frozen=True, kw_only=True)
class MatrixCasprConfig(CasprGradientConfig):
    """CASPR for matrices, Adam for vectors."""

    def triple(self, site: Site) -> Triple | None:
        return _on_matrices(super().triple(site), site)


class DecoupledSGD(torch.optim.SGD):
    """``w <- (1 - lr weight_decay) w - lr g``: the decay of AdamW, for a gradient that a maker has preconditioned."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, lr=lr)
        self.decay = weight_decay

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * self.decay)
        super().step()


def adamw(model: nn.Module, point: Point, setting: Setting) -> Pair:
    """The plain gradient and torch's AdamW."""
    betas = 1 - point["one_minus_beta1"], 1 - point["one_minus_beta2"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=point["lr"], betas=betas, weight_decay=point["weight_decay"])
    return GradientMaker(model), optimizer


def shampoo(model: nn.Module, point: Point, setting: Setting) -> Pair:
    """Bias-corrected Nesterov averages, preconditioned, with the length of NAdam's step for each tensor."""
    return ShampooGradientMaker(model, MatrixShampooConfig(**_options(point, setting))), _descent(model, point)


def caspr(model: nn.Module, point: Point, setting: Setting) -> Pair:
    """As `shampoo`, with the Kronecker sum."""
    return CasprGradientMaker(model, MatrixCasprConfig(**_options(point, setting))), _descent(model, point)


def _options(point: Point, setting: Setting) -> dict[str, Any]:
    return {
        "damping": 1e-6,
        "decay": 1 - point["one_minus_beta2"],
        "beta1": 1 - point["one_minus_beta1"],
        "nesterov_average": True,
        "grafting": "adam",
        "preconditioner_interval": setting.interval,
        "max_dim": setting.max_dim,
        "block_size": setting.block_size,
    }


def _descent(model: nn.Module, point: Point) -> DecoupledSGD:
    return DecoupledSGD(model.parameters(), point["lr"], point["weight_decay"])


METHODS: dict[str, Callable[[nn.Module, Point, Setting], Pair]] = {"adamw": adamw, "shampoo": shampoo, "caspr": caspr}
