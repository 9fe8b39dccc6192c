"""SOAP and eigenvalue-corrected Shampoo: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from gradmaker.capture.sites import Site
from gradmaker.curvature import BatchGradient
from gradmaker.methods.tensor_axes import AxesGradientConfig
from gradmaker.options.checks import check_choice
from gradmaker.options.deprecations import BASIS_INTERVAL
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.presets import Presets
from gradmaker.representations import RotatedDims
from gradmaker.schedule import Schedule
from gradmaker.solvers import RotatedDivision
from gradmaker.triple import Triple
from gradmaker.usage import Usage

__all__ = ["EshampooGradientConfig", "EshampooGradientMaker", "SoapGradientConfig", "SoapGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class SoapGradientConfig(AxesGradientConfig):
    """SOAP: ``P g = Q [(Q^T m) / (sqrt(v) + damping)]``, Adam in the eigenbasis ``Q`` of Shampoo's factors.

    ``preconditioner_interval`` is the interval of the basis ``Q``, which is refreshed before the gradient of its step is used;
    the second moment ``v`` is updated at every step. As in the reference, the first gradient makes the basis alone, and its
    step is zero; with ``skip_first=False`` it is taken with the mean of ``v`` in every entry, which the next gradient replaces.
    Vectors get Adam.

    Reference: Vyas et al., ICLR 2025, arXiv:2409.11321, algorithm 3; defaults of its code.
    """

    renamed_options = BASIS_INTERVAL

    usage = Usage(hidden=True, unit=True)
    presets: ClassVar[Presets] = {"large": {"max_dim": 1024, "preconditioner_interval": 100, "stagger": True}}
    damping: float = 1e-8
    decay: float | None = 0.95
    beta1: float = 0.95
    max_dim: int = 10000
    preconditioner_interval: int | Schedule = 10
    stagger: bool = False
    skip_first: bool | None = None
    """Whether the first gradient makes the basis alone, as in the reference; None: where every step measures."""
    precondition_vectors: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("precondition_vectors", *(() if self.skip_first is None else ("skip_first",))):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected bool")
        self._state()

    @property
    def _skips_first(self) -> bool:
        """ValueError for ``skip_first=True`` beside an interval: between measurements a gradient is not in what divides it."""
        every = self.curvature_interval == 1
        if self.skip_first and not every:
            raise ValueError(
                "skip_first=True: it goes with curvature_interval=1: moments of one gradient alone are zero in places, and "
                f"gradients that are not in them are divided by that; got curvature_interval={self.curvature_interval!r}"
            )
        return every if self.skip_first is None else self.skip_first

    def _state(self) -> RotatedDims:
        return RotatedDims(skip_first=self._skips_first, vectors=self.precondition_vectors)

    def triple(self, site: Site) -> Triple | None:
        return Triple(BatchGradient(), self._state(), RotatedDivision(power=-0.5, damping=self.damping, raw=True))


@register("soap")
class SoapGradientMaker(Preconditioned[SoapGradientConfig]):
    """SOAP as a gradient maker; see `SoapGradientConfig`."""

    Config = SoapGradientConfig


@dataclass(frozen=True, kw_only=True)
class EshampooGradientConfig(AxesGradientConfig):
    """Eigenvalue-corrected Shampoo: ``P g = Q [(Q^T m) / (v^exponent + damping)]``, the basis refreshed before ``v``.

    The basis is refreshed every ``preconditioner_interval`` steps, unless the factors in it are diagonal within ``tolerance``.

    Reference: Eschenhagen et al., 2025, arXiv:2506.03595; order and criterion of a refresh as in
    Meta's Distributed Shampoo, whose epsilon is 1e-12 and whose statistics are sums by default.
    """

    renamed_options = BASIS_INTERVAL

    usage = Usage(hidden=True, unit=True)
    damping: float = 1e-8
    decay: float | None = 0.95
    beta1: float = 0.9
    stagger: bool = False
    tracking: Literal["qr", "eigh"] = "qr"
    tolerance: float = 0.01
    exponent: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("tracking", self.tracking, ["qr", "eigh"])
        self._state()

    def _state(self) -> RotatedDims:
        return RotatedDims(
            tracking=self.tracking,
            tolerance=self.tolerance,
            sequence="basis_first",
            vectors=True,
        )

    def triple(self, site: Site) -> Triple | None:
        return Triple(BatchGradient(), self._state(), RotatedDivision(power=-self.exponent, damping=self.damping))


@register("eshampoo")
class EshampooGradientMaker(Preconditioned[EshampooGradientConfig]):
    """Eigenvalue-corrected Shampoo as a gradient maker; see `EshampooGradientConfig`."""

    Config = EshampooGradientConfig
