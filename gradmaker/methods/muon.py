"""Muon and spectral descent: the polar factor of a momentum average of gradients."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from math import sqrt
from typing import Any, ClassVar, Literal

from gradmaker.capture.shapes import Merge
from gradmaker.capture.sites import Site
from gradmaker.curvature import BatchGradient
from gradmaker.methods.tensor_axes import AxesGradientConfig
from gradmaker.options.checks import check_choice
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.presets import Presets
from gradmaker.representations import Diagonal, ZeroHistory
from gradmaker.representations.base import NO_LIMIT
from gradmaker.solvers import Division, PolarFactor
from gradmaker.triple import Triple
from gradmaker.usage import Usage

__all__ = ["MuonGradientConfig", "MuonGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class MuonGradientConfig(AxesGradientConfig):
    """Muon: ``P G = scale (M M^T)^(-1/2) M`` of a Nesterov average ``M`` of matrices; Adam for vectors.

    ``iteration`` is Muon's polynomial, Polar Express or the SVD. ``scale``: ``aspect`` sqrt(max(1, rows / columns)), ``rms``
    0.2 sqrt(max(rows, columns)) (Moonlight), ``nuclear`` the sum of the singular values (spectral descent), or ``none``.
    Parameters that match ``elementwise``, as embeddings and heads, get Adam too; ``decay`` and ``damping`` are those of Adam.

    Reference: Jordan et al. 2024, Muon; Liu et al. 2025, arXiv:2502.16982 (rms); Carlson et al., AISTATS 2015 (nuclear).
    """

    inapplicable = AxesGradientConfig.inapplicable | NO_LIMIT
    only_with: ClassVar[dict[str, dict[str, Any]]] = {
        "steps": {"iteration": ("quintic", "polar_express")},
        "half": {"iteration": ("quintic", "polar_express")},
    }

    presets: ClassVar[Presets] = {"large": {"iteration": "polar_express", "steps": 4}}
    damping: float = 1e-8
    decay: float | None = 0.999
    beta1: float = 0.95
    nesterov_average: bool = True
    merge: Merge = "to_2d"
    iteration: Literal["quintic", "polar_express", "svd"] = "quintic"
    steps: int = 5
    scale: Literal["aspect", "rms", "nuclear", "none"] = "aspect"
    half: bool | None = None
    """Whether to iterate in bfloat16; None, as published: where gradients are not of float64."""
    elementwise: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scale", self.scale, ["aspect", "rms", "nuclear", "none"])
        self._solver(1.0)

    @property
    def usage(self) -> Usage:  # type: ignore[override]
        """Of hidden weights; with ``scale='rms'`` their step has the size of Adam's."""
        return Usage(hidden=True, unit=self.scale == "rms")

    def _solver(self, gain: float) -> PolarFactor:
        return PolarFactor(method=self.iteration, steps=self.steps, gain=gain, nuclear=self.scale == "nuclear", half=self.half)

    def triple(self, site: Site) -> Triple | None:
        if len(site.shape) != 3 or any(fnmatch(name, rule) for name in site.parameters for rule in self.elementwise):
            return Triple(BatchGradient(), Diagonal(), Division(power=-0.5, damping=self.damping))
        rows, columns = site.shape[1:]
        gains = {"aspect": sqrt(max(1, rows / columns)), "rms": 0.2 * sqrt(max(rows, columns))}
        return Triple(BatchGradient(), ZeroHistory(), self._solver(gains.get(self.scale, 1.0)))


@register("muon")
class MuonGradientMaker(Preconditioned[MuonGradientConfig]):
    """Muon as a gradient maker; see `MuonGradientConfig`."""

    Config = MuonGradientConfig
