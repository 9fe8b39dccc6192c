"""Methods without a matrix of the parameters' size: rows behind products, and the small matrix of their inner products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from gradmaker.capture.sites import Site
from gradmaker.config import COVERS_ALL, ONE_BLOCK, GradientConfig, check_choice, check_count
from gradmaker.curvature import BatchGradient, Curvature, FisherEmp, FisherExact
from gradmaker.preconditioner import PreconditionedGradientMaker
from gradmaker.representations import Rows, Sketched, Truncated, Window
from gradmaker.schedule import Schedule
from gradmaker.solvers import Gram
from gradmaker.solvers.gram import Tail
from gradmaker.triple import Triple

__all__ = [
    "GgtGradientConfig",
    "GgtGradientMaker",
    "MfacGradientConfig",
    "MfacGradientMaker",
    "SengGradientConfig",
    "SengGradientMaker",
    "SmwGaussNewtonGradientConfig",
    "SmwGaussNewtonGradientMaker",
    "SmwNaturalGradientConfig",
    "SmwNaturalGradientMaker",
    "TongaGradientConfig",
    "TongaGradientMaker",
    "TongaUnitGradientConfig",
    "TongaUnitGradientMaker",
]


@dataclass(frozen=True, kw_only=True)
class _LatestBatchConfig(GradientConfig):
    damping: float = 1e-3
    """Of order one where the loss is; the authors adapt it, which is left to the user."""
    decay: float | None = 0.0
    """Zero: rows of past batches would add up without bound."""


@dataclass(frozen=True, kw_only=True)
class SmwNaturalGradientConfig(_LatestBatchConfig):
    """SMW-NG: ``P g = (F + damping)^-1 g`` with the empirical Fisher of the batch, all layers coupled, by Woodbury's identity.

    ``P g = (g - J^T (J J^T + damping)^-1 J g) / damping``, where ``J J^T`` comes from inputs and output gradients. What is
    not a layer gets ``fallback``.

    Reference: Ren & Goldfarb 2019, "Efficient subsampled Gauss-Newton and natural gradient methods for training neural
    networks", arXiv:1906.02353, section 3.
    """

    inapplicable = Rows.inapplicable | ONE_BLOCK

    fisher: Curvature = FisherEmp()
    """FisherEmp, FisherMC or FisherExact."""
    max_rows: int = 8192
    """More rows (examples times cotangents) than this are refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("max_rows", self.max_rows, 1)

    def triple(self, site: Site) -> Triple | None:
        if site.kind == "generic":
            return None
        return Triple(self.fisher, Rows(max_rows=self.max_rows), Gram(damping=self.damping))


class SmwNaturalGradientMaker(PreconditionedGradientMaker):
    """SMW-NG as a gradient maker; see `SmwNaturalGradientConfig`."""

    Config = SmwNaturalGradientConfig


@dataclass(frozen=True, kw_only=True)
class SmwGaussNewtonGradientConfig(SmwNaturalGradientConfig):
    """SMW-GN: `SmwNaturalGradientConfig` with the Gauss-Newton matrix, a row for each example and output.

    Reference: Ren & Goldfarb 2019, arXiv:1906.02353, section 3.
    """

    fisher: Curvature = FisherExact()


class SmwGaussNewtonGradientMaker(PreconditionedGradientMaker):
    """SMW-GN as a gradient maker; see `SmwGaussNewtonGradientConfig`."""

    Config = SmwGaussNewtonGradientConfig


@dataclass(frozen=True, kw_only=True)
class TongaGradientConfig(GradientConfig):
    """TONGA: ``P g = (C + damping)^-1 g``, ``C`` the running average of ``g_t g_t^T`` cut to ``rank`` every ``window`` steps.

    Reference: Le Roux, Manzagol & Bengio, NeurIPS 2007, "Topmoumoute online natural gradient algorithm", sections 4 and 5.
    """

    inapplicable = BatchGradient.inapplicable | Truncated.inapplicable | COVERS_ALL | ONE_BLOCK

    damping: float = 1e-3
    decay: float | None = 0.995
    rank: int = 10
    window: int = 50
    scale_preserving: bool = False
    """Return ``damping P g``, as in the paper, which is ``g`` where the curvature is small."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "window"):
            check_count(name, getattr(self, name), 1)

    def triple(self, site: Site) -> Triple | None:
        return self._triple("full")

    def _triple(self, granularity: Literal["full", "unit"]) -> Triple:
        held = Truncated(rank=self.rank, window=self.window, granularity=granularity)
        return Triple(BatchGradient(), held, Gram(damping=self.damping, scale_preserving=self.scale_preserving))


class TongaGradientMaker(PreconditionedGradientMaker):
    """TONGA as a gradient maker; see `TongaGradientConfig`."""

    Config = TongaGradientConfig


@dataclass(frozen=True, kw_only=True)
class TongaUnitGradientConfig(TongaGradientConfig):
    """TONGA for the incoming weights and bias of each unit by itself.

    Reference: Le Roux, Manzagol & Bengio, NeurIPS 2007, section 5 (block-diagonal version, rank 5).
    """

    inapplicable = BatchGradient.inapplicable | Truncated.inapplicable | COVERS_ALL

    rank: int = 5

    def triple(self, site: Site) -> Triple | None:
        return self._triple("unit")


class TongaUnitGradientMaker(PreconditionedGradientMaker):
    """Unit-wise TONGA as a gradient maker; see `TongaUnitGradientConfig`."""

    Config = TongaUnitGradientConfig


@dataclass(frozen=True, kw_only=True)
class MfacGradientConfig(GradientConfig):
    """M-FAC: ``P g = (damping + (1/m) sum_j r_j r_j^T)^-1 g`` over the last ``m = window`` mini-batch gradients ``r_j``.

    ``warmup='size'`` divides by ``m`` also while the window fills, as published; ``'mean'`` by the number of gradients held.

    Reference: Frantar, Kurtic & Alistarh, NeurIPS 2021, arXiv:2107.03356, section 3.2; defaults of the authors' code.
    """

    inapplicable = BatchGradient.inapplicable | Window.inapplicable | COVERS_ALL | ONE_BLOCK

    damping: float = 1e-5
    decay: float | None = None
    window: int = 1024
    warmup: Literal["size", "mean"] = "size"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window, 1)
        check_choice("warmup", self.warmup, ["size", "mean"])

    def triple(self, site: Site) -> Triple | None:
        return Triple(BatchGradient(), Window(size=self.window, scale=self.warmup), Gram(damping=self.damping))


class MfacGradientMaker(PreconditionedGradientMaker):
    """M-FAC as a gradient maker; see `MfacGradientConfig`."""

    Config = MfacGradientConfig


@dataclass(frozen=True, kw_only=True)
class GgtGradientConfig(GradientConfig):
    """GGT: ``P m = (C^(1/2) + damping)^-1 m``, ``C = sum_j beta_2^age_j g_j g_j^T`` over the last ``window`` gradients.

    ``momentum`` is beta_1 and ``decay`` beta_2 (None: 1). ``tail`` is what the part of ``m`` outside of the window gets: see
    `gradmaker.solvers.Gram`.

    Reference: Agarwal et al., ICML 2019, arXiv:1806.02958, algorithm 1.
    """

    inapplicable = BatchGradient.inapplicable | Window.inapplicable | COVERS_ALL | ONE_BLOCK

    damping: float = 1e-4
    decay: float | None = None
    momentum: float = 0.9
    window: int = 200
    tail: Tail = "eps"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window, 1)
        check_choice("tail", self.tail, ["eps", "none", "sigma_min"])

    def triple(self, site: Site) -> Triple | None:
        return Triple(
            BatchGradient(), Window(size=self.window, scale="sum"), Gram(power=-0.5, damping=self.damping, tail=self.tail)
        )


class GgtGradientMaker(PreconditionedGradientMaker):
    """GGT as a gradient maker; see `GgtGradientConfig`."""

    Config = GgtGradientConfig


@dataclass(frozen=True, kw_only=True)
class SengGradientConfig(_LatestBatchConfig):
    """SENG: ``P g = (F + damping)^-1 g`` for each layer, with the empirical Fisher of a batch now and then.

    The sketches are off, and then this is exact; the authors' are ``positions=16, coordinates=256, official=True``: see
    `gradmaker.representations.Sketched`. What is not a layer gets ``fallback``.

    Reference: Yang et al. 2021, "Sketch-based empirical natural gradient methods for deep learning", arXiv:2006.05924; defaults
    of the authors' code for CIFAR.
    """

    inapplicable = Sketched.inapplicable
    only_with: ClassVar[dict[str, dict[str, Any]]] = {"official": {"coordinates": bool}}

    damping: float = 0.05
    curvature_interval: int | Schedule = 200
    preconditioner_interval: int | Schedule = 200
    fisher: Curvature = FisherEmp()
    """FisherEmp, FisherMC or FisherExact."""
    positions: int | None = None
    coordinates: int | None = None
    official: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("positions", "coordinates"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)

    def inapplicable_options(self) -> dict[str, str]:
        """A seed is that of the coordinates too."""
        found = super().inapplicable_options()
        return {name: reason for name, reason in found.items() if self.coordinates is None or name != "seed"}

    def triple(self, site: Site) -> Triple | None:
        if site.kind == "generic":
            return None
        held = Sketched(positions=self.positions, coordinates=self.coordinates, official=self.official, seed=self.seed)
        return Triple(self.fisher, held, Gram(damping=self.damping))


class SengGradientMaker(PreconditionedGradientMaker):
    """SENG as a gradient maker; see `SengGradientConfig`."""

    Config = SengGradientConfig
